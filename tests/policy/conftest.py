from __future__ import annotations

import sys

import pytest
from policy_stubs import make_site, stub_registry

from rewriter.ir.site import AttentionSite


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rewriter.mixers.registry", stub_registry())


@pytest.fixture
def sites() -> list[AttentionSite]:
    return [make_site(i) for i in range(8)]
