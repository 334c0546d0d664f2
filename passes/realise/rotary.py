"""Rotary embeddings in the graph of an owner, so that each is emitted as one call.

What is looked for is x * c + cat(-x[h:], x[:h]) * s over the last dimension, h its middle, in
whatever order the factors and summands stand. Other spellings stay as they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from rewriter.passes.normalise.ops import arguments, is_inplace, op, value


@dataclass(frozen=True)
class Rotation:
    """Operands of a rotary embedding, as `backends.ops.rotary.rotary` takes them."""

    x: Node
    cos: Node
    sin: Node


def rotations(nodes: Iterable[Node]) -> dict[Node, Rotation]:
    """Every sum among the nodes that is a rotary embedding."""
    found = ((node, _rotation(node)) for node in nodes if _is(node, "add"))
    return {node: rotation for node, rotation in found if rotation is not None}


def _rotation(total: Node) -> Rotation | None:
    if arguments(total).get("alpha", 1) != 1:
        return None
    for straight, crossed in _orders(total):
        for turned, sin in _factors(crossed):
            x = _turned(turned)
            if x is None:
                continue
            for source, cos in _factors(straight):
                if source is x and _one_dtype(x, cos, sin, total):
                    return Rotation(x, cos, sin)
    return None


def _factors(node: Node) -> Iterator[tuple[Node, Node]]:
    if _is(node, "mul"):
        yield from _orders(node)


def _orders(node: Node) -> Iterator[tuple[Node, Node]]:
    """Both orders of the operands of a node with two."""
    one, other = node.args[:2]
    if isinstance(one, Node) and isinstance(other, Node):
        yield one, other
        yield other, one


def _turned(node: Node) -> Node | None:
    """The x of cat(-x[h:], x[:h])."""
    if not _is(node, "cat"):
        return None
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    whole, (second, first) = value(node), parts
    if not isinstance(second, Node) or not isinstance(first, Node):
        return None
    if whole is None or not _is(second, "neg"):
        return None
    if arguments(node).get("dim", 0) not in (-1, whole.dim() - 1):
        return None
    upper = second.args[0]
    width = whole.shape[-1]
    if not isinstance(upper, Node) or not isinstance(width, int) or width % 2:
        return None
    x = upper.args[0] if _is_part(upper) else None
    if not isinstance(x, Node) or (whole_x := value(x)) is None or whole_x.shape[-1] != width:
        return None
    if first.args[:1] != (x,):
        return None
    half = width // 2
    return x if _cut(upper, half, width) and _cut(first, 0, half) else None


def _cut(node: Node, start: int, end: int) -> bool:
    """Whether a node is x[..., start:end]; an end behind the last number stands for it."""
    part = value(node)
    if not _is_part(node) or part is None:
        return False
    given = arguments(node)
    if given.get("dim", 0) not in (-1, part.dim() - 1) or given.get("step", 1) != 1:
        return False
    first = given.get("start")
    begins = first in (start, start - 2 * part.shape[-1]) or (first is None and start == 0)
    return begins and part.shape[-1] == end - start


def _one_dtype(*nodes: Node) -> bool:
    """Tensors of one dtype, so that nothing is rounded or widened on the way."""
    tensors = [value(n) for n in nodes]
    return None not in tensors and len({t.dtype for t in tensors if t is not None}) == 1


def _is(node: object, name: str) -> bool:
    return isinstance(node, Node) and op(node) == name and not is_inplace(node)


def _is_part(node: object) -> bool:
    return _is(node, "slice") or _is(node, "narrow")
