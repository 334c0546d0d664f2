"""Biases computed from activations: finite by construction, though their values are not known."""

from __future__ import annotations

from torch import fx

from rewriter.passes.match.mask import HIDDEN
from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import arguments, op, tensor_inputs

_FINITE = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "tanh",
        "sigmoid",
        "softmax",
        "relu",
        "gelu",
        "silu",
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "slice",
        "select",
        "getitem",
        "split",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "pad",
        "constant_pad_nd",
        "dropout",
        "view_as",
        "reshape_as",
        "arange",
        "sin",
        "cos",
        "log_sigmoid",
        "softplus",
        "cumsum",
        "flip",
        "tril",
        "triu",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    }
)
_PICKS = frozenset({"gather", "index", "index_select", "take_along_dim"})
"""They read what they pick from; which entries they pick changes no bound."""

_ENDS = frozenset({"layer_norm", "rms_norm", "conv1d", "conv2d"})
_BOUND = -HIDDEN


def is_content(term: fx.Node, view: View, needs_gather: bool = False) -> bool:
    """Whether a term of the scores is a bias that only arithmetic on activations makes.

    Such a term hides no key: nothing on its way fills, compares or holds a large constant. Walking
    back ends at projections and norms, whose results are activations like any other.

    Args:
        needs_gather: only terms that pick or broadcast entries of a smaller tensor count; scores
            themselves would pass otherwise.
    """
    found = _walk(term, view)
    return found is not None and found[0] and (found[1] or not needs_gather)


def is_bounded(term: fx.Node, view: View) -> bool:
    """Whether nothing on the way back from a term can make it large enough to hide a key."""
    return _walk(term, view) is not None


def _walk(term: fx.Node, view: View) -> tuple[bool, bool] | None:
    """(reads activations, picks or broadcasts entries); None where a term may hide keys."""
    stack, seen = [term], set[fx.Node]()
    activations = picked = False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        known = view.captured.parameter(node.name) if node.op == "placeholder" else None
        if known is not None:
            if not known.is_floating_point():
                return None
            if not known.is_meta and known.numel() and float(known.detach().abs().max()) >= _BOUND:
                return None
            continue
        if op(node) == "embedding":
            stack.append(node.all_input_nodes[0])  # the table may hide what is far away
            activations = activations or depends_on_input(node, view)
            continue
        if view.linear(node) is not None or op(node) in _ENDS:
            activations = activations or depends_on_input(node, view)
            continue
        number = view.constants.scalar(node)
        if number is not None and abs(number) < _BOUND:
            continue
        if number is not None or _large_constant(node):
            return None
        if op(node) in _PICKS:
            picked = True
            stack.append(node.all_input_nodes[0])
        elif op(node) == "masked_fill":
            filled = view.constants.scalar(node.args[2])
            if filled is None or abs(filled) >= _BOUND:
                return None
            stack.append(node.all_input_nodes[0])  # which entries are filled changes no bound
        elif view.is_product(node) or _passes(node):
            picked = picked or (op(node) in ("expand", "unsqueeze", "pad") and bool(seen))
            stack.extend(tensor_inputs(node))
        else:
            return None
    return activations, picked


def _passes(node: fx.Node) -> bool:
    return op(node) in _FINITE or is_noop(node) or is_cast(node) or permutation(node) is not None


def _large_constant(node: fx.Node) -> bool:
    if op(node) in _PICKS or op(node) in ("slice", "view", "reshape", "_unsafe_view", "expand"):
        return False
    numbers = [a for a in arguments(node).values() if isinstance(a, float)]
    return any(abs(n) >= _BOUND for n in numbers)


def depends_on_input(node: fx.Node, view: View) -> bool:
    """True if an input of the captured module has a say in the values of `node`."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        item = stack.pop()
        if item.name in view.captured.inputs:
            return True
        if item not in seen:
            seen.add(item)
            stack.extend(tensor_inputs(item))
    return False
