"""The graph around a node as text: what a near miss shows of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriter.passes.normalise.ops import op, value

_BEFORE, _AFTER = 7, 3


def around(node: fx.Node) -> tuple[str, ...]:
    """The nodes that lead to `node` and the first that use it, in graph order, one a line.

    The node itself is marked with '>'. Sizes that may change are written as letters.
    """
    chosen = {node}
    frontier = [node]
    while frontier and len(chosen) <= _BEFORE:
        item = frontier.pop(0)
        for source in item.all_input_nodes:
            holds = isinstance(source.meta.get("val"), torch.Tensor | list | tuple)
            if holds and source not in chosen and len(chosen) <= _BEFORE:
                chosen.add(source)
                frontier.append(source)
    for user in list(node.users)[:_AFTER]:
        chosen.add(user)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    sizes: dict[str, str] = {}
    lines = (_line(n, node, sizes) for n in sorted(chosen, key=order.__getitem__))
    return tuple(lines)


def _line(node: fx.Node, marked: fx.Node, sizes: dict[str, str]) -> str:
    mark = ">" if node is marked else " "
    if node.op == "output":
        return f"{mark} returned"
    if node.op == "placeholder":
        return f"{mark} {node.name}: input or parameter {_shape(node, sizes)}".rstrip()
    given = [*node.args, *(f"{k}={_short(v)}" for k, v in node.kwargs.items())]
    args = ", ".join(a if isinstance(a, str) else _short(a) for a in given)
    return f"{mark} {node.name} = {op(node) or node.target}({args}) {_shape(node, sizes)}".rstrip()


def _short(item: Any) -> str:
    if isinstance(item, fx.Node):
        return "n" if isinstance(item.meta.get("val"), torch.SymInt) else item.name
    if isinstance(item, list | tuple):
        return "[" + ", ".join(_short(x) for x in item) + "]"
    return f"{item:g}" if isinstance(item, float) else str(item)


def _shape(node: fx.Node, sizes: dict[str, str]) -> str:
    tensor = value(node)
    if tensor is None:
        return ""
    dims = []
    for size in tensor.shape:
        text = str(size)
        dims.append(text if text.isdigit() else sizes.setdefault(text, _letter(len(sizes))))
    return f"({', '.join(dims)})"


def _letter(number: int) -> str:
    return "nmlkji"[number] if number < 6 else f"n{number}"
