"""Tensors that hold zeros and ones only, known from how they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import arguments, op, operand, value

_PICKS = frozenset(
    {"slice", "select", "unsqueeze", "squeeze", "expand", "expand_as", "view", "reshape"}
    | {"view_as", "reshape_as", "_unsafe_view", "flatten", "unflatten", "tril", "triu", "repeat"}
)
_ONES = frozenset({"ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros"})


def is_binary(
    node: fx.Node, kept: Callable[[str], torch.Tensor | None] = lambda name: None
) -> bool:
    """Whether every entry is 0 or 1: it was a bool once, or ones cut to a triangle.

    Args:
        kept: the tensor behind a placeholder; buffers count by what they hold, parameters never do.
    """
    while True:
        val = value(node)
        if val is None:
            return False
        if node.op == "placeholder" and val.dtype != torch.bool:
            return _holds_bits(kept(node.name))
        if val.dtype == torch.bool or op(node) in _ONES:
            return True
        if op(node) in _PICKS or permutation(node) is not None or is_cast(node) or is_noop(node):
            node = operand(node)
            continue
        complement = complement_of(node)
        if complement is None:
            return False
        node = complement


def _holds_bits(tensor: torch.Tensor | None) -> bool:
    if tensor is None or tensor.is_meta or isinstance(tensor, nn.Parameter):
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


@dataclass(frozen=True)
class Line:
    """scale * base + shift, elementwise."""

    base: fx.Node
    scale: float
    shift: float


def line(node: fx.Node) -> Line:
    """A node as a line in the tensor that it is made of by adding and multiplying numbers."""
    scale, shift = 1.0, 0.0
    while True:
        step = _step(node)
        if step is not None:
            node, factor, offset = step
            scale, shift = scale * factor, scale * offset + shift
        elif is_noop(node) or is_cast(node):
            node = operand(node)
        else:
            return Line(node, scale, shift)


def complement_of(node: fx.Node) -> fx.Node | None:
    """b if the node is 1 - b."""
    step = _step(node)
    return step[0] if step is not None and step[1:] == (-1.0, 1.0) else None


def _step(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """(x, a, c) if the node is a * x + c."""
    name, a = op(node), arguments(node)
    if name == "neg":
        return operand(node), -1.0, 0.0
    if name not in ("add", "sub", "rsub", "mul", "div") or len(node.args) < 2:
        return None
    alpha = a.get("alpha", 1)
    left, right = node.args[:2]
    if not isinstance(alpha, int | float) or isinstance(left, fx.Node) == isinstance(
        right, fx.Node
    ):
        return None
    if not isinstance(left, fx.Node):
        return None
    if isinstance(right, bool) or not isinstance(right, int | float):
        return None
    number = float(right)
    if name == "mul":
        return left, number, 0.0
    if name == "div":
        return None if a.get("rounding_mode") or number == 0.0 else (left, 1.0 / number, 0.0)
    if name == "rsub":
        return left, -float(alpha), number
    return left, 1.0, number * alpha if name == "add" else -number * alpha
