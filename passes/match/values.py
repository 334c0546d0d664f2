"""From a softmax forward to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.passes.match.draft import Labelled, Sink
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.contract import contraction
from rewriter.passes.normalise.layout import forward
from rewriter.passes.normalise.noops import is_cast
from rewriter.passes.normalise.ops import arguments, dimension, op

_DROPOUTS = frozenset({"dropout", "native_dropout", "feature_dropout", "alpha_dropout"})


_OF_HIDDEN_ROWS = frozenset({"nan_to_num"})
"""Operators that only change rows without a visible key; every core gives 0 there."""


@dataclass(frozen=True)
class Values:
    """The product of probabilities and values.

    `weights` are the probabilities of the keys, if something besides this product uses them.
    """

    value: Labelled
    output: Labelled
    dropout: float
    weights: Labelled | None


def values(
    softmax: fx.Node,
    labels: Labels,
    key_axis: tuple[int, ...],
    view: View,
    axes: Axes,
    sink: Sink | None = None,
) -> Values | Refusal:
    """Follow the probabilities to the one contraction that sums values over `key_axis`."""
    kept = Labelled(softmax, labels)
    ends: list[tuple[fx.Node, fx.Node, Labels, float]] = []
    strangers: list[fx.Node] = []
    before_slice: list[fx.Node] = []  # users of probabilities that still hold the sink's column
    stack: list[tuple[fx.Node, Labels, float, bool]] = [(softmax, labels, 0.0, sink is not None)]
    while stack:
        node, here, dropped, with_sink = stack.pop()
        for user in node.users:
            if view.is_product(user):
                ends.append((user, node, here, dropped))
                continue
            if op(user) in _DROPOUTS:
                stack.append((user, here, float(arguments(user)["p"]), with_sink))
                continue
            idle = is_cast(user) or op(user) in _OF_HIDDEN_ROWS
            after = here if idle else forward(user, here, axes, view.sizes)
            holds = with_sink
            if after is None and sink is not None and with_sink:
                after = without_sink(user, here, sink, view, axes)
                if after is not None:
                    kept, holds = Labelled(user, after), False
            if after is not None:
                stack.append((user, after, dropped, holds))
            else:
                strangers.append(user)
                before_slice += [user] if with_sink else []
    if not ends:
        return _no_end(softmax, strangers)
    if len(ends) > 1:
        return Refusal("the probabilities enter more than one product", ends[1][0])
    end, probabilities, here, dropped = ends[0]
    product = _product(end, probabilities, here, key_axis, view, axes)
    if isinstance(product, Refusal):
        return product
    value, output = product
    if _depends(value.node, softmax, view):
        return Refusal("the values depend on the probabilities", value.node)
    if before_slice:
        reason = "something besides the values uses probabilities with a sink"
        return Refusal(reason, before_slice[0])
    return Values(value, output, dropped, kept if strangers else None)


def without_sink(
    node: fx.Node, labels: Labels, sink: Sink, view: View, axes: Axes
) -> Labels | None:
    """Labels behind the slice that takes the sink's column away, None for any other node."""
    if op(node) != "slice":
        return None
    a = arguments(node)
    dim = dimension(int(a["dim"] or 0), len(labels))
    start = a["start"] or 0
    wanted = axes.total(axes.leaves(sink.keys))
    if axes.leaves(labels[dim]) != axes.leaves(sink.axis) or a["step"] not in (None, 1):
        return None
    if view.sizes.of(node)[dim] != wanted or start != (1 if sink.first else 0):
        return None
    return (*labels[:dim], sink.keys, *labels[dim + 1 :])


def _no_end(softmax: fx.Node, strangers: list[fx.Node]) -> Refusal:
    inner = [s for s in strangers if s.op != "output"]
    if not inner:
        return Refusal("the softmax is not followed by a product with values", softmax)
    kind = op(inner[0]) or str(inner[0].target)
    return Refusal(f"'{kind}' stands between the softmax and any product with values", inner[0])


def _product(
    node: fx.Node,
    probabilities: fx.Node,
    labels: Labels,
    key_axis: tuple[int, ...],
    view: View,
    axes: Axes,
) -> tuple[Labelled, Labelled] | Refusal:
    """Values and output of `node`, its axes unified with those of the probabilities."""
    found = contraction(node, axes.fresh(view.sizes.of(node)), axes, view.sizes)
    if found is None or isinstance(found, str):
        return Refusal(found or "no contraction", node)
    if found.added is not None or found.alpha != 1.0:
        return Refusal("something is added to the product with the values", node)
    if found.left is found.right or probabilities not in (found.left, found.right):
        return Refusal("the probabilities are multiplied with themselves", node)
    mine, other, theirs = found.left_labels, found.right, found.right_labels
    if probabilities is found.right:
        mine, other, theirs = found.right_labels, found.left, found.left_labels
    known = {dim: axes.leaves(now) for dim, now in zip(mine, labels, strict=True) if dim}

    def renamed(dims: Labels) -> Labels:
        return tuple(known.get(dim, dim) for dim in dims)

    value = Labelled(other, renamed(theirs))
    output = Labelled(node, renamed(found.out_labels))
    both = (axes.leaves(a for dim in ls for a in dim) for ls in (value.labels, labels))
    summed = set.intersection(*map(set, both)) - {a for d in output.labels for a in axes.leaves(d)}
    if summed != set(axes.leaves(key_axis)):
        return Refusal("the values are summed over another axis than the softmax runs over", node)
    return value, output


def _depends(node: fx.Node, on: fx.Node, view: View) -> bool:
    """True if `node` is computed from `on`."""
    stack, seen, first = [node], set[fx.Node](), view.order[on]
    while stack:
        item = stack.pop()
        if item is on:
            return True
        if item not in seen and view.order[item] > first:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False
