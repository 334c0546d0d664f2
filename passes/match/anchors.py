"""Where attention may be: attention operators and every spelling of softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from rewriter.ir.site import AddTerm, FillTerm, Scale, ScoreStep
from rewriter.passes.match.draft import Draft, Facts, Labelled
from rewriter.passes.match.scores import scores
from rewriter.passes.match.values import values
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.ops import arguments, op, operand, value
from rewriter.passes.normalise.softmax import Softmax, softmax

_FUSED = "scaled_dot_product_attention"


def candidates(view: View) -> Iterator[fx.Node]:
    """Nodes that end a softmax or are a whole attention, in graph order."""
    found = {node: softmax(node) for node in view.graph.nodes}
    inside = {n for s in found.values() if s is not None for n in s.nodes if n is not s.node}
    for node, read_ in found.items():
        if op(node) == _FUSED or (read_ is not None and node not in inside):
            yield node


def read(node: fx.Node, view: View, facts: Facts) -> Draft | Refusal:
    """The core around an anchor, or the reason why it is none."""
    if op(node) == _FUSED:
        return _fused(node, view, facts)
    found = softmax(node)
    if found is None:
        return Refusal("no softmax", node)
    return _softmax(found, view, facts)


def _softmax(found: Softmax, view: View, facts: Facts) -> Draft | Refusal:
    axes, labels = view.axes(found.node)
    if not labels[found.dim]:
        return Refusal("the softmax runs over an axis of size 1", found.node)
    facts.add(f"{found.normaliser} over dimension {found.dim}")
    facts.step = "scores"
    path = scores(found, labels, view, axes, facts)
    if isinstance(path, Refusal):
        return path
    facts.add(f"product of '{path.query.node.name}' and '{path.key.node.name}'")
    key_axis = labels[found.dim] if path.sink is None else path.sink.keys
    facts.step = "values"
    end = values(found.node, labels, key_axis, view, axes, path.sink)
    if isinstance(end, Refusal):
        return end
    facts.add(f"values '{end.value.node.name}'")

    def flat(item: Labelled) -> list[int]:
        return [a for dim in axes.resolve(item.labels) for a in dim]

    query, key, value_, output = (flat(x) for x in (path.query, path.key, end.value, end.output))
    key_axis = axes.leaves(key_axis)
    channel = tuple(a for a in query if a in key and a not in output)
    query_axis = tuple(a for a in query if a not in key and a in output and a not in value_)
    if not channel or (not query_axis and () not in path.query.labels):
        return Refusal("queries and keys share no channel axis", path.query.node)
    value_channel = tuple(a for a in output if a not in query)
    if not set(key_axis) <= set(value_):
        return Refusal("keys and values have different token axes", end.value.node)
    return Draft(
        spelling="eager",
        anchor=found.node,
        axes=axes,
        query=path.query,
        key=path.key,
        value=end.value,
        output=end.output,
        query_axis=_token_axis(query_axis, axes.resolve(path.query.labels), axes, view),
        key_axis=key_axis,
        channel=channel,
        value_channel=value_channel,
        steps=path.steps,
        terms=path.terms,
        softmax_dtype=path.softmax_dtype,
        dropout=end.dropout,
        weights=end.weights,
        normaliser=found.normaliser,
    )


def _token_axis(free: tuple[int, ...], labels: Labels, axes: Axes, view: View) -> tuple[int, ...]:
    """Of the dimensions that only queries have: the one of free size, else the innermost.

    Others are head groups that keys and values broadcast over.
    """
    dims = [dim for dim in labels if dim and set(dim) <= set(free)]
    moving = [dim for dim in dims if view.sizes.dynamic(axes.total(dim))]
    if len(moving) == 1:
        return moving[0]
    return dims[-1] if dims else free  # a single query has no axis


def _fused(node: fx.Node, view: View, facts: Facts) -> Draft | Refusal:
    a = arguments(node)
    query, key, value_, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    axes, out = view.axes(node)
    facts.add("scaled_dot_product_attention")
    shape = view.sizes.of(query)
    if len(shape) < 3:
        return Refusal("attention without a batch or head axis", node)
    channel, tokens = axes.new(shape[-1]), axes.new(view.sizes.of(key)[-2])
    groups = _groups(node, view)
    if isinstance(groups, Refusal):
        return groups
    batch = list(out[:-2])
    key_batch = list(batch)
    if groups > 1:
        split = axes.regroup((batch[-1],), (axes.total(batch[-1]) // groups, groups))
        if split is None:
            return Refusal("query heads are no multiple of key heads", node)
        batch[-1], key_batch[-1] = (*split[0], *split[1]), split[0]

    def labels(item: fx.Node, leading: list[tuple[int, ...]], *last: tuple[int, ...]) -> Labels:
        sizes = view.sizes.of(item)[:-2]
        used = leading[len(leading) - len(sizes) :]
        kept = (() if s == 1 else dim for s, dim in zip(sizes, used, strict=True))
        return (*kept, *last)

    factor = a.get("scale")
    factor = 1.0 / math.sqrt(shape[-1]) if factor is None else view.constants.scalar(factor)
    if factor is None:
        return Refusal("the scale is no constant", node)
    steps: list[ScoreStep] = [Scale(factor)]
    terms: list[Labelled] = []
    if isinstance(mask, fx.Node):
        boolean = "bool" in str(view.dtype(mask))
        steps.append(FillTerm(0, -math.inf, keep=True) if boolean else AddTerm(0))
        sizes = view.sizes.of(mask)
        aligned = (*batch, out[-2], tokens)[len(batch) + 2 - len(sizes) :]
        term = tuple(() if s == 1 else dim for s, dim in zip(sizes, aligned, strict=True))
        terms.append(Labelled(mask, term))
    return Draft(
        spelling="sdpa",
        anchor=node,
        axes=axes,
        query=Labelled(query, labels(query, batch, out[-2], channel)),
        key=Labelled(key, labels(key, key_batch, tokens, channel)),
        value=Labelled(value_, labels(value_, key_batch, tokens, out[-1])),
        output=Labelled(node, out),
        query_axis=out[-2],
        key_axis=tokens,
        channel=channel,
        value_channel=out[-1],
        steps=tuple(steps),
        terms=tuple(terms),
        dropout=float(a["dropout_p"]),
        causal_flag=bool(a["is_causal"]),
    )


def _groups(node: fx.Node, view: View) -> int | Refusal:
    a = arguments(node)
    if not a.get("enable_gqa"):
        return 1
    query, key = view.sizes.of(operand(node, 0)), view.sizes.of(operand(node, 1))
    if value(operand(node, 2)) is None or query[-3] % key[-3]:
        return Refusal("query heads are no multiple of key heads", node)
    return query[-3] // key[-3]
