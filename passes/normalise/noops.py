"""Nodes that do not change values: same-dtype casts, copies, full slices, idle dropout."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.extension import transparent_operators
from rewriter.passes.normalise.ops import arguments, op, operand, value

_COPIES = frozenset({"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh"})
_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "_autocast_to_full_precision"})


def is_noop(node: fx.Node) -> bool:
    """True if the node returns its first argument's values in the same shape and dtype."""
    name = op(node)
    if name in _COPIES:
        return True
    if name in _CASTS:
        return not changes_dtype(node)
    if name == "slice":
        a = arguments(node)
        return a["start"] in (None, 0) and a["step"] == 1 and _same_shape(node)
    if name in ("expand", "expand_as", "broadcast_to"):
        return _same_shape(node)
    if name in ("mul", "div", "add", "sub"):
        return _neutral(node, name)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        a = arguments(node)
        return not a["train"] or a["p"] == 0.0
    return name in transparent_operators() and _same_shape(node) and not changes_dtype(node)


def _neutral(node: fx.Node, name: str) -> bool:
    """x * 1, x / 1, x + 0 and x - 0 for a Python number, in the same dtype."""
    if len(node.args) < 2 or isinstance(node.args[1], bool | fx.Node) or node.kwargs:
        return False
    neutral = 1.0 if name in ("mul", "div") else 0.0
    return bool(node.args[1] == neutral) and not changes_dtype(node)


def is_cast(node: fx.Node) -> bool:
    """True for any conversion node, also one that changes nothing in this capture."""
    return op(node) in _CASTS


def cast_dtype(node: fx.Node) -> torch.dtype | None:
    val = value(node)
    return val.dtype if val is not None else None


def changes_dtype(node: fx.Node) -> bool:
    before, after = value(operand(node)), value(node)
    return before is None or after is None or before.dtype != after.dtype


def strip(node: fx.Node) -> fx.Node:
    """The node behind all no-ops."""
    while is_noop(node):
        node = operand(node)
    return node


def strip_casts(node: fx.Node) -> fx.Node:
    """The node behind all no-ops and casts."""
    while is_noop(node) or is_cast(node):
        node = operand(node)
    return node


def _same_shape(node: fx.Node) -> bool:
    before, after = value(operand(node)), value(node)
    if before is None or after is None or before.dim() != after.dim():
        return False
    pairs = zip(before.shape, after.shape, strict=True)
    return all(str(x) == str(y) for x, y in pairs)
