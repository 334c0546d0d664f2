"""Does a module compute every token by itself outside its attention? Read off its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from rewriter.ir.site import NearMiss
from rewriter.passes.capture import capture
from rewriter.passes.match import match
from rewriter.passes.match.view import View
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import arguments, op, tensor_inputs, value

_REDUCTIONS = frozenset(
    {"mean", "sum", "var", "std", "amax", "amin", "softmax", "_softmax", "log_softmax"}
)
_NORMS = frozenset({"layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm"})
_LAYOUT = frozenset(
    {"view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "flatten",
     "unflatten", "expand", "t", "to", "type_as", "getitem", "alias"}
)  # fmt: skip
_CUTS = frozenset({"slice", "select", "split", "split_with_sizes", "chunk", "narrow", "unbind"})
_JOINS = frozenset({"cat", "stack"})


def mixing(module: nn.Module, named: Mapping[str, Any]) -> str | None:
    """What in a module mixes tokens or depends on their place, outside attention; None if nothing.

    Args:
        named: its arguments by name, in a call with at least two rows and two tokens.
    """
    captured = capture(module, (), named)
    if isinstance(captured, NearMiss):
        return captured.reason
    view = View(captured)
    found = match(captured)
    if found.misses or len(found.matches) != 1:
        return f"{len(found.matches)} attention blocks were understood in it, not one"
    core = found.matches[0].nodes
    inside = set(core.region)
    masks = _ancestors([t.node for t in core.terms])
    moving = _descendants([n for n in view.graph.nodes if n.name in captured.inputs])
    for node in view.graph.nodes:
        if node.op != "call_function" or node in inside or node in masks:
            continue
        if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            continue  # sizes
        if node not in moving and _symbolic(node):
            return f"'{node.name}' depends on the place of a token, not on its value"
        if node in moving and not _tokenwise(node, view):
            return f"'{node.name}' ({op(node)}) may mix tokens"
    return None


def _tokenwise(node: fx.Node, view: View) -> bool:
    name = op(node)
    if is_noop(node) or name in _LAYOUT or view.linear(node) is not None:
        return True
    if name in _NORMS:
        shape = arguments(node).get("normalized_shape") or ()
        return all(isinstance(n, int) for n in shape)
    if name in _REDUCTIONS | _CUTS | _JOINS:
        return _static_dims(node)
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _static_dims(node: fx.Node) -> bool:
    """Whether the axes that a node works along have sizes that do not change with the batch."""
    given = arguments(node)
    dims = given.get("dim")
    source = value(tensor_inputs(node)[0])
    if source is None or (dims is None and op(node) not in _CUTS | _JOINS):
        return False
    rank = source.dim() + (op(node) == "stack")
    axes = dims if isinstance(dims, list | tuple) else [0 if dims is None else dims]
    if op(node) == "stack":
        return True
    if op(node) == "slice" and is_noop(node):
        return True
    return bool(axes) and all(isinstance(source.shape[d % rank], int) for d in axes)


def _symbolic(node: fx.Node) -> bool:
    val = value(node)
    return val is not None and any(isinstance(n, torch.SymInt) for n in val.shape)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on the values of these tensors, not only on their sizes."""
    seen = set(nodes)
    stack = list(nodes)
    while stack:
        for user in stack.pop().users:
            if user not in seen and isinstance(user.meta.get("val"), torch.Tensor | list | tuple):
                seen.add(user)
                stack.append(user)
    return seen
