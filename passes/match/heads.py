"""Give the axes of a draft their names: batch, head groups, tokens, channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from rewriter.ir.site import HeadGroups, Scale
from rewriter.passes.match.draft import Draft, Labelled, Side
from rewriter.passes.match.operands import Entry, absorb, chain, factor_upstream, leaves_of
from rewriter.passes.match.projected import channel_attention, projected_dimension
from rewriter.passes.match.result import Axis, Layout, Operand
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.layout import forward
from rewriter.passes.normalise.ops import value

Names = tuple[tuple[Axis, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Operands:
    """Named operands of a core, and the factors found on queries and keys."""

    query: Operand
    key: Operand
    value: Operand
    output: Operand
    terms: tuple[Operand, ...]
    weights: Operand | None
    heads: HeadGroups
    scales: tuple[Scale, ...]
    prescaled: float
    query_start: fx.Node


@dataclass(frozen=True)
class _Roles:
    """Leaf axes by role. `kv` is the part of `head` that keys and values have."""

    batch: tuple[int, ...]
    window: tuple[int, ...]
    head: tuple[int, ...]
    kv: tuple[int, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]
    channel: tuple[int, ...]
    value_channel: tuple[int, ...]

    def names(self, side: Side | None) -> Names:
        group = self.head[len(self.kv) :]
        heads: Names = (("head", self.head), ("kv_head", self.kv), ("group", group))
        if side in ("key", "value"):
            heads = (("kv_head", self.kv),)
        rest: Names = (("token", self.query), ("token", self.key))
        channels: Names = (("channel", self.channel), ("channel", self.value_channel))
        rows: Names = (("batch", self.batch), ("window", self.window))
        if self.window:
            rows = (("batch", (*self.batch, *self.window)), *rows)
        return (*rows, *heads, *rest, *channels)


def operands(draft: Draft, view: View) -> Operands | Refusal:
    """Choose the operand nodes, count heads and describe the layouts."""
    axes = draft.axes
    _split_by_users(draft, view)
    chains: dict[Side, tuple[Entry, ...]] = {
        "query": chain(draft.query, view, axes),
        "key": chain(draft.key, view, axes),
        "value": chain(draft.value, view, axes),
    }
    mixed = channel_attention(draft, chains["query"][-1], view)
    if mixed is not None:
        return mixed
    shared = _shared_axes(draft, view)
    if isinstance(shared, Refusal):
        return shared
    batch, head = shared
    window, head = _windows(chains, draft, view, head)
    moving = tuple(a for a in head if view.sizes.dynamic(axes.size(a)))
    window, head = (*window, *moving), tuple(a for a in head if a not in moving)
    kv = _kv_heads((*batch, *window), head, chains["key"], chains["value"], axes)
    if not window:
        window, head, kv = _outer_windows(draft, axes, head, kv)
    if not window:
        batch, window = _masked_windows(draft, axes, batch)
    roles = _Roles(
        batch,
        window,
        head,
        kv,
        axes.leaves(draft.query_axis),
        axes.leaves(draft.key_axis),
        axes.leaves(draft.channel),
        axes.leaves(draft.value_channel),
    )
    picked: dict[Side, int] = {}
    for side, entries in chains.items():
        index = _pick(entries, roles, side, axes)
        if index is None:
            node = entries[0].node
            return Refusal(f"the axes of the {side} cannot be told apart", node)
        picked[side] = index
    named = [
        _operand(Labelled(c[picked[s]].node, c[picked[s]].labels), roles, s, axes)
        for s, c in chains.items()
    ]
    output = _operand(draft.output, roles, None, axes)
    terms = [_operand(t, roles, None, axes) for t in draft.terms]
    weights = _operand(draft.weights, roles, None, axes) if draft.weights else None
    for item in (*named, output, *terms, weights):
        if isinstance(item, Refusal):
            return item
    scales = [
        *(Scale(f.value, "query", f.divide) for f in chains["query"][picked["query"]].factors),
        *(Scale(f.value, "key", f.divide) for f in chains["key"][picked["key"]].factors),
    ]
    if chains["value"][picked["value"]].factors:
        return Refusal("the values are scaled inside the core", draft.value.node)
    query, key, value = named
    assert isinstance(query, Operand) and isinstance(key, Operand) and isinstance(value, Operand)
    assert isinstance(output, Operand) and not isinstance(weights, Refusal)
    return Operands(
        query=query,
        key=key,
        value=value,
        output=output,
        terms=tuple(t for t in terms if isinstance(t, Operand)),
        weights=weights,
        heads=HeadGroups(
            query=axes.total(roles.head),
            key_value=axes.total(roles.kv),
            key_dim=axes.total(roles.channel),
            value_dim=axes.total(roles.value_channel),
        ),
        scales=tuple(scales),
        prescaled=factor_upstream(chains["query"], picked["query"]),
        query_start=chains["query"][-1].node,
    )


def _split_by_users(draft: Draft, view: View) -> None:
    """Let the layout operators behind the output split its axes: rows of the batch from heads.

    The queries show that too where a reshape stands before the core, but not behind an unbind.
    """
    node, labels = draft.output.node, draft.output.labels
    while len(node.users) == 1:
        (user,) = node.users
        after = forward(user, labels, draft.axes, view.sizes) if value(user) is not None else None
        if after is None:
            return
        node, labels = user, after


def _shared_axes(draft: Draft, view: View) -> tuple[tuple[int, ...], tuple[int, ...]] | Refusal:
    """(batch, head) leaf axes, outermost first, from the query as it meets the keys."""
    axes, sizes = draft.axes, view.sizes
    own = {*axes.leaves(draft.query_axis), *axes.leaves(draft.channel)}
    dims = [dim for dim in axes.resolve(draft.query.labels) if not set(dim) & own]
    if not draft.query_axis and () in dims:  # a single query: the last dimension of size 1
        del dims[len(dims) - 1 - dims[::-1].index(())]
    order = {a: i for i, dim in enumerate(axes.resolve(draft.output.labels)) for a in dim}
    leaves = [a for dim in dims for a in dim]
    if any(a not in order for a in leaves):
        return Refusal("the output lacks an axis of the queries", draft.output.node)
    if len(dims) >= 2 and dims[-1] and all(sizes.dynamic(axes.size(a)) for a in dims[-1]):
        outer = tuple(a for dim in dims[:-1] for a in dim)
        if outer and not any(sizes.dynamic(axes.size(a)) for a in outer):
            return dims[-1], outer  # the heads lead
        moving = [sizes.dynamic(axes.size(a)) for a in leaves]
        first_static = moving.index(False) if False in moving else 0
        if first_static and len(dims) > 1:  # rows and heads, then windows whose number is free
            return tuple(leaves[:first_static]), tuple(leaves[first_static:])
    if len(dims) >= 2:
        first = set(dims[0])
        last = max((i for i, a in enumerate(leaves) if sizes.dynamic(axes.size(a))), default=-1)
        count = max(last + 1, len(first))
        return tuple(leaves[:count]), tuple(leaves[count:])
    if len(leaves) == 1 and sizes.dynamic(axes.size(leaves[0])):
        heads = sizes.static_factor(axes.size(leaves[0]))
        if heads > 1:
            leaves = list(axes.split(leaves[0], axes.size(leaves[0]) // heads))
    dynamic = [i for i, a in enumerate(leaves) if sizes.dynamic(axes.size(a))]
    count = dynamic[-1] + 1 if dynamic else min(1, len(leaves))
    return tuple(leaves[:count]), tuple(leaves[count:])


def _kv_heads(
    batch: tuple[int, ...],
    head: tuple[int, ...],
    key: tuple[Entry, ...],
    value: tuple[Entry, ...],
    axes: Axes,
) -> tuple[int, ...]:
    """Leading head axes that both keys and values have before repetition (contract 2)."""

    def counts(entries: tuple[Entry, ...]) -> set[int]:
        out = set()
        for entry in entries:
            here = leaves_of(entry, axes)
            if set(batch) & leaves_of(entries[0], axes) - here:
                continue
            kept = [a in here for a in head]
            if kept == sorted(kept, reverse=True):
                out.add(sum(kept))
        return out

    common = counts(key) & counts(value)
    return head[: min(common)] if common else head


def _windows(
    chains: Mapping[Side, tuple[Entry, ...]], draft: Draft, view: View, head: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(windows, heads): heads are cut from the channels of a projection, windows from its tokens.

    Where no head was seen in one dimension with channels, and none is what a projection gave,
    nothing tells the two apart.
    """
    axes = draft.axes
    channels = {*axes.leaves(draft.channel), *axes.leaves(draft.value_channel)}
    apart: set[int] = set()
    for entry in (e for entries in chains.values() for e in entries):
        dims = axes.resolve(entry.labels)
        beside = {a for dim in dims if set(dim) & channels for a in dim}
        at = projected_dimension(entry.node)
        projected = at == -1 and bool(set(dims[at]) & channels)
        if beside & set(head) or projected:
            apart |= {a for dim in dims for a in dim if a in head} - beside
    windows = tuple(a for a in head if a in apart)
    return windows, tuple(a for a in head if a not in apart)


def _masked_windows(
    draft: Draft, axes: Axes, batch: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(batch, windows): inner axes of the batch that a mask has without the outer ones."""
    for term in draft.terms:
        for dim in axes.resolve(term.labels):
            if dim and len(dim) < len(batch) and dim == batch[-len(dim) :]:
                return batch[: -len(dim)], dim
    return batch, ()


def _outer_windows(
    draft: Draft, axes: Axes, head: tuple[int, ...], kv: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(windows, heads, key/value heads): of two head-like dimensions and no repetition, the outer
    one holds windows."""
    dims = [d for d in axes.resolve(draft.query.labels) if d and set(d) <= set(head)]
    if len(dims) < 2 or len(kv) < len(head):
        return (), head, kv
    inner = dims[-1]
    return tuple(a for a in head if a not in inner), inner, inner


def _pick(entries: tuple[Entry, ...], roles: _Roles, side: Side, axes: Axes) -> int | None:
    """Nearest entry to the contraction in canonical layout, else with tokens before channels."""
    wanted = {"query": roles.head}.get(side, roles.kv)
    channel = roles.value_channel if side == "value" else roles.channel
    token = roles.query if side == "query" else roles.key
    start = leaves_of(entries[0], axes)
    rows = (*roles.batch, *roles.window)
    needed = {*(a for a in rows if a in start), *wanted, *token, *channel}
    if side == "query":
        needed &= start
    best: tuple[int, int] | None = None
    for i, entry in enumerate(entries):
        if leaves_of(entry, axes) != needed:
            continue
        layout = _layout(entry.labels, roles, side, axes)
        if layout is None:
            continue
        rank = _preference(layout, side)
        if best is None or rank < best[0]:
            best = (rank, i)
    return None if best is None else absorb(entries, best[1])


def _preference(layout: Layout, side: Side) -> int:
    """0 for (batch, head, token, channel), 1 for other layouts ending so, 2 for the rest."""
    head = "head" if side == "query" else "kv_head"
    dims = layout.dims
    if dims[-2:] not in ((("token",), ("channel",)), ((), ("channel",))):
        return 2
    if len(dims) == 4 and dims[0] in (("batch",), ()) and dims[1] in ((head,), ()):
        return 0
    return 1


def _operand(item: Labelled, roles: _Roles, side: Side | None, axes: Axes) -> Operand | Refusal:
    layout = _layout(item.labels, roles, side, axes)
    if layout is None:
        return Refusal("its axes cannot be told apart", item.node)
    return Operand(item.node, layout)


def _layout(labels: Labels, roles: _Roles, side: Side | None, axes: Axes) -> Layout | None:
    table = sorted(roles.names(side), key=lambda n: -len(n[1]))
    dims: list[tuple[Axis, ...]] = []
    for dim in axes.resolve(labels):
        names: list[Axis] = []
        position = 0
        while position < len(dim):
            for name, leaves in table:
                if leaves and dim[position : position + len(leaves)] == leaves:
                    names.append(name)
                    position += len(leaves)
                    break
            else:
                return None
        dims.append(tuple(names))
    return Layout(tuple(dims))
