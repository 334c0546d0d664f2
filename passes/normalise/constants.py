"""Scalars that the graph knows: Python numbers, filled tensors, and arithmetic on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import arguments, op, operand

_BINARY: Mapping[str, Callable[[float, float], float]] = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
}
_UNARY: Mapping[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1.0 / math.sqrt(a),
    "neg": lambda a: -a,
    "reciprocal": lambda a: 1.0 / a,
}
_SHAPE_ONLY = frozenset(
    {"expand", "view", "reshape", "unsqueeze", "squeeze", "expand_as", "view_as", "reshape_as"}
)
_FILLED = frozenset({"full", "scalar_tensor", "full_like", "new_full"})


class Constants:
    """Folds nodes to scalars. `tensors` holds lifted constants and, if known, buffers.

    Every node is folded once, so the graph must not change while this is in use.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._known: dict[fx.Node, float | None] = {}

    def scalar(self, item: Any) -> float | None:
        """The number that `item` holds in every element, or None if it is not one constant."""
        if isinstance(item, bool) or item is None:
            return None
        if isinstance(item, int | float):
            return float(item)
        if not isinstance(item, fx.Node):
            return None
        if item.op == "placeholder":
            tensor = self._tensors.get(item.name)
            return float(tensor.item()) if tensor is not None and tensor.numel() == 1 else None
        if item not in self._known:
            self._known[item] = self._folded(item)
        return self._known[item]

    def _folded(self, node: fx.Node) -> float | None:
        name = op(node)
        if is_noop(node) or is_cast(node) or name in _SHAPE_ONLY:
            return self.scalar(operand(node))
        a = arguments(node)
        if name in _FILLED:
            return self.scalar(a.get("fill_value", a.get("s")))
        if name in ("zeros", "zeros_like", "new_zeros"):
            return 0.0
        if name in ("ones", "ones_like", "new_ones"):
            return 1.0
        if name in _UNARY:
            inner = self.scalar(node.args[0])
            return None if inner is None else _UNARY[name](inner)
        if name in _BINARY and len(node.args) >= 2 and not node.kwargs:
            left, right = self.scalar(node.args[0]), self.scalar(node.args[1])
            if left is None or right is None:
                return None
            return _BINARY[name](left, right)
        return None
