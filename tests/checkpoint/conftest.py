from __future__ import annotations

import sys

import pytest
from checkpoint_stubs import stub_registry


@pytest.fixture
def stub_mixers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in mixer is the only one registered."""
    monkeypatch.setitem(sys.modules, "rewriter.mixers.registry", stub_registry())
