"""Bring operands of any layout to (batch, head, token, channel) and outputs back again."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from rewriter.ir.site import HeadGroups
from rewriter.passes.match.result import Axis, Layout

CANONICAL: tuple[Axis, ...] = ("batch", "head", "token", "channel")
CANONICAL_KV: tuple[Axis, ...] = ("batch", "kv_head", "token", "channel")


def _size(axis: Axis, heads: HeadGroups, channels: int, tokens: Any, windows: Any) -> Any:
    sizes = {
        "head": heads.query,
        "kv_head": heads.key_value,
        "group": heads.group,
        "channel": channels,
        "token": tokens,
        "window": windows,
        "batch": -1,
    }
    return sizes[axis]


def to_canonical(
    graph: Graph,
    node: Node,
    layout: Layout,
    order: tuple[Axis, ...],
    heads: HeadGroups,
    channels: int,
    tokens: Any,
    windows: Any = 1,
) -> Node:
    """Emit the ops that turn `node` from `layout` into the axes `order`.

    `tokens` is the number of new tokens, `windows` that of the windows of a row: an int or a node
    that computes it.
    """
    if layout.dims == tuple((axis,) for axis in order):
        return node
    axes: list[Axis | None] = []
    for dim in layout.dims:
        if len(dim) > 1:
            sizes = [_size(axis, heads, channels, tokens, windows) for axis in dim]
            if -1 not in sizes:
                sizes[0] = -1
            node = graph.call_method("unflatten", (node, len(axes), tuple(sizes)))
        axes.extend(dim if dim else (None,))
    for position in reversed([n for n, axis in enumerate(axes) if axis is None]):
        node = graph.call_method("squeeze", (node, position))
        del axes[position]
    named: list[Axis] = [axis for axis in axes if axis is not None]
    if "batch" not in named:
        node = graph.call_method("unsqueeze", (node, 0))
        named.insert(0, "batch")
    if "token" not in named:
        node = graph.call_method("unsqueeze", (node, len(named)))
        named.append("token")
    grouped = "group" in named
    if order == CANONICAL_KV and "kv_head" not in named and "head" not in named:
        node = graph.call_method("unsqueeze", (node, 1))
        named.insert(1, "kv_head")
    if order == CANONICAL_KV and "head" in named and "kv_head" not in named:
        named[named.index("head")] = "kv_head"
    if order == CANONICAL and not {"head", "kv_head", "group"} & set(named):
        node = graph.call_method("unsqueeze", (node, 1))
        named.insert(1, "head")
    wanted: list[Axis] = []
    for axis in order:
        if axis == "head" and grouped:
            wanted += ["kv_head", "group"]
        else:
            wanted.append(axis)
    windowed = "window" in named
    if windowed:
        wanted.insert(1, "window")
    permutation = tuple(named.index(axis) for axis in wanted)
    if permutation != tuple(range(len(permutation))):
        node = graph.call_method("permute", (node, permutation))
    if windowed:
        node = graph.call_method("flatten", (node, 0, 1))
    if grouped and order == CANONICAL:
        node = graph.call_method("flatten", (node, 1, 2))
    return node


def from_canonical(
    graph: Graph, node: Node, layout: Layout, heads: HeadGroups, windows: Any = 1
) -> Node:
    """Emit the ops that turn (batch, head, token, channel) into `layout`."""
    if layout.dims == tuple((axis,) for axis in CANONICAL):
        return node
    flat: list[Axis] = [axis for dim in layout.dims for axis in dim]
    have: list[Axis] = list(CANONICAL)
    if "group" in flat:
        node = graph.call_method("unflatten", (node, 1, (heads.key_value, heads.group)))
        have[1:2] = ["kv_head", "group"]
    elif "kv_head" in flat:
        have[1] = "kv_head"
    if "window" in flat:
        node = graph.call_method("unflatten", (node, 0, (-1, windows)))
        have.insert(1, "window")
    if "batch" not in flat:
        node = graph.call_method("squeeze", (node, 0))
        have.remove("batch")
    if not {"head", "kv_head"} & set(flat):
        node = graph.call_method("squeeze", (node, have.index("head")))
        have.remove("head")
    if "token" not in flat:
        node = graph.call_method("squeeze", (node, have.index("token")))
        have.remove("token")
    permutation = tuple(have.index(axis) for axis in flat)
    if permutation != tuple(range(len(permutation))):
        node = graph.call_method("permute", (node, permutation))
    for position, dim in enumerate(layout.dims):
        if len(dim) > 1:
            node = graph.call_method("flatten", (node, position, position + len(dim) - 1))
        elif not dim:
            node = graph.call_method("unsqueeze", (node, position))
    return node
