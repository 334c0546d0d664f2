"""Models that do not trace as a whole still get their attention found and rewritten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import EinsumAttention, Residual
from torch import nn

import rewriter
from rewriter.passes.find import Inspection


class Undecided(nn.Module):
    """Looks at values on the way, so that no single graph exists."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        if x.sum() > 0:
            return x
        return 2 * x


class LeavesTorch(nn.Module):
    """Hands its values to numpy before it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = EinsumAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * float(np.tanh(x.detach().numpy()).max() < 2)


class Untraceable(EinsumAttention):
    """The attention itself depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, Inspection]:
    torch.manual_seed(0)
    layers = [Residual(EinsumAttention()) for _ in range(2)]
    model = Undecided([*layers, LeavesTorch(), Untraceable()]).eval()
    return model, rewriter.inspect(model, torch.randn(2, 9, 64))


def test_every_part_that_traces_is_found(found: tuple[nn.Module, Inspection]) -> None:
    _, here = found
    owners = ["layers.0.attention", "layers.1.attention", "layers.2.inner"]
    assert [site.fqn for site in here.sites] == owners
    assert [site.index for site in here.sites] == [0, 1, 2]
    assert here.parts == ("layers.0", "layers.1", "layers.2.inner")
    assert all(site.mask.describe() == "causal" for site in here.sites)
    first, second, _ = here.sites
    assert first.fingerprint == second.fingerprint
    assert {p.module for p in second.projections.values()} == {
        f"layers.1.attention.{name}" for name in ("to_q", "to_k", "to_v", "out")
    }
    moved = replace(first, fqn=second.fqn, index=1, source=second.source)
    assert replace(moved, projections=second.projections) == second


def test_what_does_not_trace_is_named_with_file_and_line(
    found: tuple[nn.Module, Inspection],
) -> None:
    _, here = found
    assert here.whole is not None
    assert [miss.source.module for miss in here.misses] == ["layers.3"]
    for miss in (here.whole, *here.misses):
        assert miss.source.file == __file__
        assert miss.source.line is not None


def test_the_parts_are_rewritten(found: tuple[nn.Module, Inspection]) -> None:
    model, _ = found
    x = torch.randn(3, 12, 64)
    result = rewriter.rewrite(model, "identity", torch.randn(2, 9, 64), on_miss="ignore")
    assert [d.status for d in rewriter.plan_of(result).decisions] == ["done"] * 3
    assert torch.equal(result(x), model(x))


class Again(Undecided):
    """One layer, several times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = super().forward(x)
        return x


def test_a_part_that_runs_several_times_is_rewritten_once() -> None:
    torch.manual_seed(0)
    model = Again([Residual(EinsumAttention())]).eval()
    x = torch.randn(2, 9, 64)
    here = rewriter.inspect(model, x)
    assert [(s.fqn, s.run, s.runs) for s in here.sites] == [
        ("layers.0.attention", run, 3) for run in range(3)
    ]
    result = rewriter.rewrite(model, "identity", x)
    assert torch.equal(result(x[:, :5]), model(x[:, :5]))


def test_a_model_that_does_not_run_gives_the_reason() -> None:
    here = rewriter.inspect(Undecided([nn.Linear(3, 3)]), torch.randn(2, 9, 64))
    assert here.sites == ()
    assert "cannot be traced" in here.misses[0].reason
