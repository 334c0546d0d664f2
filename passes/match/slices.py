"""The part of the graph that a mask or bias tensor is computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.ops import is_inplace, op, value

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


def integer_constants(part: Slice) -> tuple[int, ...]:
    """Integers that may be window or chunk sizes: arguments of arithmetic and comparisons."""
    out: set[int] = set()
    for node in part.nodes:
        if value(node) is None or op(node) not in _ARITHMETIC:
            continue
        flat = (*node.args, *node.kwargs.values())
        for item in flat:
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            if math.isfinite(item) and float(item).is_integer() and 2 <= abs(item) < _LARGEST:
                out.add(abs(int(item)))
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
    }
)
