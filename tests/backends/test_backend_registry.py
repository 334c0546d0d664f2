"""Resolution: priority, reasons, and plugins that cannot be loaded."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from rewriter.backends import registry
from rewriter.backends.reference.window import window_attention
from rewriter.backends.registry import Query, choose, resolve
from rewriter.ir.kernels import JointWindowLinear, WindowAttention
from rewriter.ir.recurrence import Recurrence

WINDOW = WindowAttention(4, 1, True, 1.0)


class OnlyForward:
    """A backend that serves windows without gradients."""

    name = "only_forward"
    priority = 10

    def decline(self, query: Query) -> str | None:
        return "it has no backward" if query.needs_grad else None

    def kernel(self, query: Query) -> Any:
        return window_attention


@pytest.mark.parametrize("spec", [WINDOW, Recurrence(4, 4), JointWindowLinear(4, 1, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_total(spec: Any, dtype: torch.dtype) -> None:
    kernel = resolve(spec, "cpu", dtype, needs_grad=True)
    assert kernel.backend == "reference"
    assert callable(kernel.run)


def test_priority_and_reasons() -> None:
    query = Query(WINDOW, "cpu", torch.float32, False)
    assert choose(query, [OnlyForward()]).backend == "only_forward"
    trained = choose(Query(WINDOW, "cpu", torch.float32, True), [OnlyForward()])
    assert trained.backend == "reference"
    assert trained.declined == (("only_forward", "it has no backward"),)


def test_broken_plugins_become_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("gone", "no_such_module:Backend", registry.GROUP),
        EntryPoint("wrong", "math:pi", registry.GROUP),
        EntryPoint("good", f"{__name__}:OnlyForward", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    good, broken = registry.installed()
    assert [b.name for b in good] == ["only_forward"]
    assert [name for name, _ in broken] == ["gone", "wrong"]
    kernel = choose(Query(WINDOW, "cpu", torch.float32, True), good, broken)
    assert [name for name, _ in kernel.declined] == ["gone", "wrong", "only_forward"]


def test_a_variable_limits_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Recurrence(16, 16, normaliser="ones")
    monkeypatch.setenv(registry.VARIABLE, "reference")
    assert resolve(spec, "cpu", torch.float32).backend == "reference"
    monkeypatch.setenv(registry.VARIABLE, "cpu, reference")
    assert resolve(spec, "cpu", torch.float32).backend == "cpu"
    monkeypatch.delenv(registry.VARIABLE)
    assert resolve(spec, "cpu", torch.float32).backend == "cpu"
    declined = dict(resolve(spec, "cpu", torch.float16).declined)
    assert "float16" in declined["cpu"]
    assert "not for cpu" in declined["triton"]
