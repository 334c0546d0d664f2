"""Operators that only move elements: read their axis labels backwards and forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import arguments, dimension, op, operand, value
from rewriter.passes.normalise.sizes import Sizes

_RESHAPES = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"}
)
_INSERTS = frozenset({"unsqueeze", "squeeze"})
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_REVERSALS = frozenset({"t", "numpy_T", "mT", "adjoint", "matrix_H"})


@dataclass(frozen=True)
class Step:
    """One layout operator read backwards: labels of its input, and axes that it repeated."""

    source: fx.Node
    labels: Labels
    repeated: tuple[int, ...] = ()


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Output dimension d holds input dimension result[d]; None if the node is no permutation."""
    name = op(node)
    val = value(node)
    if val is None:
        return None
    rank = val.dim()
    order = list(range(rank))
    if name in _SWAPS:
        a = dimension(int(node.args[1]), rank)  # type: ignore[arg-type]
        b = dimension(int(node.args[2]), rank)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        order = [dimension(int(d), rank) for d in arguments(node)["dims"]]
    elif name in ("numpy_T", "t"):
        order.reverse()
    elif name in _REVERSALS:
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "movedim":
        order = _movedim(node, rank)
    else:
        return None
    return tuple(order)


def regroups(node: fx.Node) -> bool:
    """True if the node gives the elements of its first argument, each once, in another layout.

    Further tensors among its arguments (`view_as`, `reshape_as`) lend their sizes alone.
    """
    return op(node) in _RESHAPES or op(node) in _INSERTS or permutation(node) is not None


def backward(node: fx.Node, labels: Labels, axes: Axes, sizes: Sizes) -> Step | None:
    """Labels of the input of a layout operator, from those of its output; None for other nodes."""
    if is_noop(node):
        return Step(operand(node), labels)
    name = op(node)
    if name in _RESHAPES or name in _INSERTS:
        source = operand(node)
        before = axes.regroup(labels, sizes.of(source))
        return None if before is None else Step(source, before)
    order = permutation(node)
    if order is not None:
        before_list: list[tuple[int, ...]] = [()] * len(order)
        for out, inner in enumerate(order):
            before_list[inner] = labels[out]
        return Step(operand(node), tuple(before_list))
    if name in ("expand", "expand_as", "broadcast_to"):
        return _expand(node, labels, axes, sizes)
    if name in ("repeat_interleave", "repeat"):
        return _repeat(node, labels, axes, sizes)
    if name in ("stack", "cat"):
        return _copies(node, labels, axes, sizes)
    return None


def forward(node: fx.Node, labels: Labels, axes: Axes, sizes: Sizes) -> Labels | None:
    """Labels of the output of a layout operator, from those of its input; None for other nodes."""
    if is_noop(node):
        return labels
    if op(node) in _RESHAPES or op(node) in _INSERTS:
        return axes.regroup(labels, sizes.of(node))
    order = permutation(node)
    return None if order is None else tuple(labels[d] for d in order)


def _expand(node: fx.Node, labels: Labels, axes: Axes, sizes: Sizes) -> Step:
    source = operand(node)
    shape, wide = sizes.of(source), sizes.of(node)
    offset = len(wide) - len(shape)
    repeated: list[int] = [axis for dim in labels[:offset] for axis in axes.leaves(dim)]
    before: list[tuple[int, ...]] = []
    for d, size in enumerate(shape):
        if size == 1 and wide[d + offset] != 1:
            repeated.extend(axes.leaves(labels[d + offset]))
            before.append(())
        else:
            before.append(labels[d + offset])
    return Step(source, tuple(before), tuple(repeated))


def _repeat(node: fx.Node, labels: Labels, axes: Axes, sizes: Sizes) -> Step | None:
    """repeat_interleave repeats consecutively (inner axis), repeat tiles (outer axis)."""
    source = operand(node)
    shape, wide = sizes.of(source), sizes.of(node)
    if len(shape) != len(wide):
        return None
    before: list[tuple[int, ...]] = []
    repeated: list[int] = []
    for d, size in enumerate(shape):
        if wide[d] == size:
            before.append(labels[d])
            continue
        inner = op(node) == "repeat_interleave"
        times = wide[d] // size
        parts = axes.regroup((labels[d],), (size, times) if inner else (times, size))
        if parts is None:
            return None
        before.append(parts[0] if inner else parts[1])
        repeated.extend(parts[1] if inner else parts[0])
    return Step(source, tuple(before), tuple(repeated))


def _copies(node: fx.Node, labels: Labels, axes: Axes, sizes: Sizes) -> Step | None:
    """One tensor stacked or concatenated with itself is a repetition."""
    a = arguments(node)
    parts = a["tensors"]
    if not isinstance(parts, list | tuple) or len(set(parts)) != 1 or len(parts) < 2:
        return None
    source, dim = parts[0], dimension(int(a["dim"]), len(labels))
    if op(node) == "stack":
        return Step(source, (*labels[:dim], *labels[dim + 1 :]), axes.leaves(labels[dim]))
    split = axes.regroup((labels[dim],), (len(parts), sizes.of(source)[dim]))
    if split is None:
        return None
    return Step(source, (*labels[:dim], split[1], *labels[dim + 1 :]), axes.leaves(split[0]))


def _movedim(node: fx.Node, rank: int) -> list[int]:
    a = arguments(node)

    def as_list(item: Any) -> list[int]:
        values = item if isinstance(item, list | tuple) else [item]
        return [dimension(int(v), rank) for v in values]

    source, destination = as_list(a["source"]), as_list(a["destination"])
    order = [-1] * rank
    for s, d in zip(source, destination, strict=True):
        order[d] = s
    rest = iter(d for d in range(rank) if d not in source)
    return [next(rest) if d < 0 else d for d in order]
