"""Everything that a plan asks for beside attention."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rewriter.passes.exact import gated, linears, norms, padding
from rewriter.passes.realise.channel import apply_mlps
from rewriter.plan import Plan

M = TypeVar("M", bound=nn.Module)


def rest(model: M, plan: Plan) -> M:
    """Carry out, in place, what a plan asks for beside attention."""
    apply_mlps(model, plan.mlps)
    layers(model, plan)
    padding.apply(model, plan.packed)
    return model


def layers(model: nn.Module, plan: Plan) -> None:
    """Put linear layers, gated MLP blocks and normalisations on generated code, in place."""
    linears.apply(model, plan.linears)
    gated.apply(model, plan.fused)
    norms.apply(model, plan.fused)
