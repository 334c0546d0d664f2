"""Everything that a plan asks for beside attention."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rewriter.passes.exact import linears, padding
from rewriter.passes.realise.channel import apply_mlps
from rewriter.plan import Plan

M = TypeVar("M", bound=nn.Module)


def rest(model: M, plan: Plan) -> M:
    """Carry out, in place, what a plan asks for beside attention."""
    apply_mlps(model, plan.mlps)
    linears.apply(model, plan.linears)
    padding.apply(model, plan.packed)
    return model
