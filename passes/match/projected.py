"""Which dimension of an operand holds the channels of its projection."""

from __future__ import annotations

import copy

from torch import fx

from rewriter.passes.match.draft import Draft
from rewriter.passes.match.operands import Entry
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.layout import backward
from rewriter.passes.normalise.linear import CONVOLUTIONS
from rewriter.passes.normalise.ops import arguments, dimension, op, operand


def channel_attention(draft: Draft, last: Entry, view: View) -> Refusal | None:
    """Some models let channels attend to channels, each a row over all tokens."""
    axes, node, labels = copy.deepcopy(draft.axes), last.node, last.labels  # looking splits axes
    query = set(axes.leaves(draft.query_axis))
    for _ in range(_REACH):
        at = projected_dimension(node)
        if at is not None:
            if not query & set(axes.resolve(labels)[at]):
                return None
            reason = "the softmax runs over the channels of a projection, not over tokens"
            return Refusal(reason, draft.anchor)
        step = backward(node, labels, axes, view.sizes)
        if step is not None:
            node, labels = step.source, step.labels
        elif op(node) == "getitem" and op(operand(node)) == "unbind":
            parts = operand(node)  # queries, keys and values side by side
            node = operand(parts)
            dim = dimension(int(arguments(parts)["dim"]), len(labels) + 1)
            labels = (*labels[:dim], axes.new(view.sizes.of(node)[dim]), *labels[dim:])
        elif op(node) in _ELEMENTWISE and view.sizes.of(operand(node)) == view.sizes.of(node):
            node = operand(node)
        else:
            return None
    return None


_PARTS = frozenset({"getitem", "chunk", "split", "split_with_sizes", "unsafe_split"})
_REACH = 30
_ELEMENTWISE = frozenset({"div", "mul", "add", "sub", "layer_norm", "rms_norm", "relu"})


def projected_dimension(node: fx.Node) -> int | None:
    """Dimension of the channels in what a linear layer or a convolution gave, or a part of it."""
    while op(node) in _PARTS and node.args and isinstance(node.args[0], fx.Node):
        node = operand(node)
    if op(node) in CONVOLUTIONS:
        return 1
    return -1 if op(node) in ("linear", "addmm") else None
