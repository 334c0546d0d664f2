"""Tests run on the reference kernels unless they ask for generated ones.

Every tiny shape of a test would otherwise be compiled for itself. The generated kernels have their
own tests in tests/backends, and whole models run on them in tests/real.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rewriter.backends.registry import VARIABLE

os.environ.setdefault(VARIABLE, "reference")


@pytest.fixture
def generated_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All backends, as a person has them."""
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
