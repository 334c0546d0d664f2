"""Read ATen nodes by operator and argument name, whatever the overload or in-place spelling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx

from rewriter.passes.torch_private import operator_name, schema_arguments

_PYTHON: Mapping[Any, str] = {
    operator.getitem: "getitem",
    operator.mul: "sym_mul",
    operator.add: "sym_add",
    operator.sub: "sym_sub",
    operator.floordiv: "sym_floordiv",
    operator.truediv: "sym_truediv",
}

_TENSORS = (torch.Tensor, list, tuple)


def op(node: object) -> str:
    """Short operator name: 'softmax' for aten.softmax.int, 'add' for add_; '' for non-calls."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    return _short_name(cast("Callable[..., Any]", node.target))


def is_inplace(node: fx.Node) -> bool:
    """True if the operator writes into its first argument."""
    name = operator_name(node.target)
    return name.endswith("_") and not name.endswith("__")


@cache
def _short_name(target: Callable[..., Any]) -> str:
    if target in _PYTHON:
        return _PYTHON[target]
    namespace, _, name = operator_name(target).partition("::")
    if namespace != "aten":
        return operator_name(target) or getattr(target, "__name__", "")
    return name.removesuffix("_") if not name.endswith("__") else name


@cache
def _schema(target: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    return schema_arguments(target) or ()


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in. Empty for what is no ATen operator."""
    schema = _schema(cast("Callable[..., Any]", node.target))
    out = dict(schema)
    out.update(zip((name for name, _ in schema), node.args, strict=False))
    out.update(node.kwargs)
    return out


def operand(node: fx.Node, position: int = 0) -> fx.Node:
    """The tensor at a position of the arguments."""
    value = node.args[position]
    if not isinstance(value, fx.Node):
        raise TypeError(f"argument {position} of '{node.name}' is no tensor")
    return value


def value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it holds something else."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs that are tensors or tuples of tensors (sizes left out)."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), _TENSORS)]


_LENDERS = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})


def lends(node: fx.Node) -> bool:
    """Whether the second argument of a node gives its shape or dtype and no values."""
    name = op(node)
    return name in _LENDERS or (
        name == "to" and len(node.args) > 1 and isinstance(node.args[1], fx.Node)
    )


def dimension(index: int, rank: int) -> int:
    """A dimension index made positive."""
    return index + rank if index < 0 else index
