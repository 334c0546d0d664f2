"""Tests run on the reference kernels unless they ask for generated ones.

Every tiny shape of a test would otherwise be compiled for itself. The generated kernels have their
own tests in tests/backends, and whole models run on them in tests/real.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from rewriter.backends.registry import VARIABLE
from rewriter.mixers.exact import fused

os.environ.setdefault(VARIABLE, "reference")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what shares a captured model or a prepared directory.

    Tests of one case of the zoo share its trace, tests of one file share its fixtures; spread over
    the workers each of them would make these again. Tests of kernels share nothing.
    """
    # The longest chain first, so that it does not run alone at the end.
    items.sort(key=lambda item: item.path.parent.name not in ("real", "api"))
    for item in items:
        alone = item.path.parent.name in ("backends", "ir")
        if not alone and item.get_closest_marker("xdist_group") is None:
            case = getattr(item, "callspec", None)
            shared = case.params.get("case") if case is not None else None
            name = "-".join(map(str, shared)) if isinstance(shared, tuple) else item.path.name
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture
def generated_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All backends, as a person has them."""
    monkeypatch.delenv(VARIABLE, raising=False)
    yield


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran an exact core."""
    names: list[str] = []
    resolve = fused.resolve

    def spy(*args: Any, **kwargs: Any) -> Any:
        kernel = resolve(*args, **kwargs)
        names.append(kernel.backend)
        return kernel

    monkeypatch.setattr(fused, "resolve", spy)
    return names
