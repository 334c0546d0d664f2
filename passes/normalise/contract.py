"""One contraction for matmul, bmm, baddbmm and einsum: two operands and the axes they share."""

from __future__ import annotations

import string
from dataclasses import dataclass

from torch import fx

from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.ops import arguments, op, operand
from rewriter.passes.normalise.sizes import Sizes

CONTRACTIONS = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum", "__matmul__"})


@dataclass(frozen=True)
class Contraction:
    """out = alpha * sum over the shared axes of left * right + beta * added."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    added: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0


def is_contraction(node: fx.Node) -> bool:
    return op(node) in CONTRACTIONS


def contraction(
    node: fx.Node, out_labels: Labels, axes: Axes, sizes: Sizes
) -> Contraction | str | None:
    """Read `node` as a contraction whose result carries `out_labels`.

    Returns None if the node is no contraction, or a sentence that says what is not understood.
    """
    name = op(node)
    if name == "einsum":
        return _einsum(node, out_labels, axes, sizes)
    if name not in CONTRACTIONS:
        return None
    if name == "baddbmm":
        a = arguments(node)
        added, left, right = operand(node, 0), operand(node, 1), operand(node, 2)
        alpha, beta = float(a["alpha"]), float(a["beta"])
        return _matmul(node, left, right, out_labels, axes, sizes, added, alpha, beta)
    return _matmul(node, operand(node, 0), operand(node, 1), out_labels, axes, sizes)


def _matmul(
    node: fx.Node,
    left: fx.Node,
    right: fx.Node,
    out: Labels,
    axes: Axes,
    sizes: Sizes,
    added: fx.Node | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Contraction | str:
    shape_left, shape_right = sizes.of(left), sizes.of(right)
    if len(shape_left) < 2 or len(shape_right) < 2:
        return "a product with a vector is no attention"
    shared = axes.new(shape_left[-1])
    batch = out[:-2]
    return Contraction(
        node=node,
        left=left,
        right=right,
        left_labels=(*_batch(batch, shape_left[:-2]), out[-2], shared),
        right_labels=(*_batch(batch, shape_right[:-2]), shared, out[-1]),
        out_labels=out,
        added=added if added is not None and beta != 0.0 else None,
        alpha=alpha,
        beta=beta,
    )


def _batch(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Leading labels of an operand; a size of 1 broadcasts and carries no axis."""
    used = labels[len(labels) - len(shape) :]
    return tuple(() if size == 1 else dim for dim, size in zip(used, shape, strict=True))


def _einsum(node: fx.Node, out: Labels, axes: Axes, sizes: Sizes) -> Contraction | str:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return "an einsum of more than two operands"
    equation = _explicit(equation, [sizes.of(x) for x in operands if isinstance(x, fx.Node)])
    terms, result = equation.split("->")
    left_letters, right_letters = terms.split(",")
    if any(len(set(t)) != len(t) for t in (left_letters, right_letters, result)):
        return f"the einsum '{equation}' takes a diagonal"
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return "an einsum of something that is no tensor"
    table = dict(zip(result, out, strict=True))
    for letters, item in ((left_letters, left), (right_letters, right)):
        for letter, size in zip(letters, sizes.of(item), strict=True):
            if letter not in table:
                table[letter] = axes.new(size)
    lone = (set(left_letters) ^ set(right_letters)) - set(result)
    if lone:
        return f"the einsum '{equation}' sums an axis of one operand alone"
    return Contraction(
        node=node,
        left=left,
        right=right,
        left_labels=_einsum_labels(left, left_letters, table, sizes),
        right_labels=_einsum_labels(right, right_letters, table, sizes),
        out_labels=out,
    )


def _explicit(equation: str, shapes: list[tuple[int, ...]]) -> str:
    """The equation with an ellipsis spelled out and with its result."""
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    hidden = [
        len(s) - len(t.replace("...", "")) if "..." in t else 0
        for t, s in zip(letters, shapes, strict=False)
    ]
    whole = "".join(free[: max(hidden, default=0)])
    letters = [
        t.replace("...", whole[len(whole) - count :])
        for t, count in zip(letters, hidden, strict=False)
    ]
    if not arrow:
        joined = "".join(t.replace("...", "") for t in terms.split(","))
        result = "..." * ("..." in terms)
        result += "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return ",".join(letters) + "->" + result.replace("...", whole)


def _einsum_labels(
    node: fx.Node, letters: str, table: dict[str, tuple[int, ...]], sizes: Sizes
) -> Labels:
    shape = sizes.of(node)
    return tuple(() if s == 1 else table[c] for c, s in zip(letters, shape, strict=True))
