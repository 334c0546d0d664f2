"""One linear for linear, addmm, matmul with a parameter and their transposed spellings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import op, operand

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "__matmul__"})


@dataclass(frozen=True)
class Linear:
    """`node` = `source` times a parameter (plus bias)."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node

    @property
    def of_channels(self) -> bool:
        """Whether it sums over the last dimension of what it reads, and not over tokens."""
        name = op(self.node)
        if name != "einsum":
            return name in ("linear", "addmm") or operand(self.node, 0) is self.source
        terms, _, result = str(self.node.args[0]).replace(" ", "").partition("->")
        sides = dict(zip(cast(Any, self.node.args[1]), terms.split(","), strict=True))
        return not sides[self.source] or sides[self.source][-1] not in result


def linear(node: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> Linear | None:
    """Read a node as a projection by a parameter, or None."""
    name = op(node)
    if name == "linear":
        return Linear(node, operand(node, 0), operand(node, 1))
    if name == "addmm":
        pair = (operand(node, 1), operand(node, 2))
    elif name in _PRODUCTS:
        pair = (operand(node, 0), operand(node, 1))
    elif name == "einsum" and isinstance(node.args[1], list | tuple) and len(node.args[1]) == 2:
        left, right = node.args[1]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        pair = (left, right)
    else:
        return None
    for source, weight in (pair, pair[::-1]):
        if is_parameter(_behind_layout(weight)) and not is_parameter(_behind_layout(source)):
            return Linear(node, source, weight)
    return None


def _behind_layout(node: fx.Node) -> fx.Node:
    while is_noop(node) or is_cast(node) or permutation(node) or op(node) in ("view", "reshape"):
        node = operand(node)
    return node
