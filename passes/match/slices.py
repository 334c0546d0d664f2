"""The part of the graph that a mask or bias tensor is computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.ops import is_inplace, lends, op, value

_VIEWS = frozenset(
    {"view", "reshape", "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "detach"}
)
SHAPE_ONLY = frozenset(
    {
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
    }
)
"""Operators that read shape and dtype of their input, never its values."""

_LARGEST = 1 << 24
_FEW, _FEW_CONSTANTS = 16, 4
_HIDES = 1e3
"""Entries of a float table below minus this may hide keys."""


@dataclass(frozen=True)
class Slice:
    """Nodes that determine the values of `target`, in graph order, placeholders included."""

    target: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self.nodes if n.op == "placeholder")


def slice_of(target: fx.Node, view: View) -> Slice:
    """Ancestors of `target` by value, with in-place writes to anything among them."""
    found: set[fx.Node] = set()
    _ancestors(target, found)
    writers = [n for n in view.graph.nodes if is_inplace(n)]
    grown = True
    while grown:
        grown = False
        for node in writers:
            if node not in found and not found.isdisjoint(_aliases(node)):
                _ancestors(node, found)
                grown = True
    nodes = sorted(found, key=view.order.__getitem__)
    return Slice(target, tuple(nodes))


def _ancestors(node: fx.Node, found: set[fx.Node]) -> None:
    stack = [node]
    while stack:
        item = stack.pop()
        if item in found or _is_size(item):
            continue
        found.add(item)
        sources: Iterable[fx.Node] = item.all_input_nodes
        if op(item) in SHAPE_ONLY:
            sources = [n for n in sources if n is not item.args[0]]
        elif lends(item):
            sources = [n for n in sources if n is item.args[0]]
        stack.extend(sources)


def _is_size(node: fx.Node) -> bool:
    """Symbolic numbers are computed from the probe's sizes, not from tensors."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """Tensors whose memory an in-place operator writes."""
    out: set[fx.Node] = set()
    item = node.args[0]
    while isinstance(item, fx.Node) and item not in out:
        out.add(item)
        if op(item) not in _VIEWS and permutation(item) is None:
            break
        item = item.args[0]
    return out


def integer_constants(part: Slice, view: View) -> tuple[int, ...]:
    """Integers that may be window or chunk sizes: of arithmetic, comparisons and small tensors."""
    out: set[int] = set()
    squared = any(_squares(node) for node in part.nodes)
    for node in part.nodes:
        if node.op == "placeholder":
            out.update(_small_tensor(view.captured.parameter(node.name)))
            continue
        if value(node) is None or op(node) not in _ARITHMETIC:
            continue
        for item in (*node.args, *node.kwargs.values()):
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            if "shift" in op(node) and 0 < item < 24:
                item = 2**item
            elif 0 < abs(item) < 1:  # x * (1 / 32) instead of x // 32
                item = round(1 / item)
            if math.isfinite(item) and float(item).is_integer() and 2 <= abs(item) < _LARGEST:
                out.add(abs(int(item)))
    if squared:  # a distance may be compared by its square
        out |= {math.isqrt(c) for c in out} - {1}
    return tuple(sorted(out))


def _squares(node: fx.Node) -> bool:
    if op(node) in ("pow", "square"):
        return True
    return op(node) == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]


def _small_tensor(tensor: torch.Tensor | None) -> set[int]:
    if tensor is None or tensor.is_meta or tensor.dtype == torch.bool or tensor.numel() > _FEW:
        return set()
    return {
        abs(int(x)) for x in tensor.flatten().tolist() if 2 <= abs(x) < _LARGEST and x == int(x)
    }


def products(constants: Sequence[int]) -> tuple[int, ...]:
    """Periods that nested divisions by a few constants make."""
    if len(constants) > _FEW_CONSTANTS:
        return ()
    pairs = {a * b for a in constants for b in constants}
    return tuple(sorted(n for n in pairs - set(constants) if n < _LARGEST))


def table_sizes(part: Slice, view: View) -> tuple[int, ...]:
    """Lengths of kept tensors whose entries may hide keys: what they hold shows at that length."""
    out: set[int] = set()
    for node in part.inputs:
        tensor = view.captured.parameter(node.name)
        if tensor is None or tensor.is_meta or not tensor.numel():
            continue
        if tensor.is_floating_point():
            flat = tensor.detach()
            binary = bool(((flat == 0) | (flat == 1)).all())
            if not binary and float(flat.min()) > -_HIDES:
                continue
        out.update(n for n in tensor.shape if n > 2)
    return tuple(sorted(out))


_ARITHMETIC = frozenset(
    {
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "floor_divide",
        "remainder",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "clamp",
        "tril",
        "triu",
        "full",
        "scalar_tensor",
        "full_like",
        "new_full",
        "where",
        "bitwise_right_shift",
        "bitwise_left_shift",
        "__rshift__",
        "__lshift__",
    }
)
