"""An anchor: softmax with one added to its denominator, so that a head may attend to nothing.

softmax_one(x)_i = exp(x_i) / (1 + sum_j exp(x_j)), after E. Miller, "Attention Is Off By One".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriter.extension import Anchor, Reading

aten = torch.ops.aten


def softmax_one(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """No exponent is positive: the largest of the scores and of 0 is taken away first."""
    top = x.amax(dim, keepdim=True).clamp_min(0.0)
    e = (x - top).exp()
    return e / (e.sum(dim, keepdim=True) + (-top).exp())


class SoftmaxOne(Anchor):
    """Read back from the division that ends it; adding a constant to all scores changes it."""

    name = "softmax_one"

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        return softmax_one(scores)

    def read(self, node: fx.Node) -> Reading | None:
        if not _calls(node, aten.div.Tensor):
            return None
        e, below = node.args
        if not _calls(below, aten.add.Tensor) or not _calls(e, aten.exp.default):
            return None
        total, one = below.args
        if not _calls(total, aten.sum.dim_IntList) or total.args[0] is not e:
            return None
        if not _calls(one, aten.exp.default) or not _calls(one.args[0], aten.neg.default):
            return None
        shifted = e.args[0]
        if not _calls(shifted, aten.sub.Tensor) or shifted.args[1] is not one.args[0].args[0]:
            return None
        (dim,) = total.args[1]
        return Reading(shifted.args[0], dim % node.meta["val"].dim())


def _calls(node: Any, operator: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is operator
