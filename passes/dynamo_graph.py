"""A graph that `torch.compile` hands to its backend, in the form that the matcher reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from rewriter.ir.site import NearMiss, Source
from rewriter.passes import torch_private
from rewriter.passes.capture import Captured
from rewriter.passes.provenance import normalise_stacks

_ROOT = re.compile(r"[LG]\['[^']*'\]")
_KEY = re.compile(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers"})


def capture_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> Captured | NearMiss:
    """The graph as undecomposed ATen; parameters and buffers are told from the other inputs.

    Placeholders keep dynamo's names, order and sizes, so the result can be compiled in the place of
    the original. `module` is not changed.

    Args:
        module: dynamo's graph; every parameter is an input of it.
        inputs: the real inputs of the call that is being compiled.
    """
    holders = list(module.graph.find_nodes(op="placeholder"))
    values = [torch_private.example_value(node) for node in holders]
    if any(value is None for value in values):
        return NearMiss("capture", "an input of the graph has no example value", Source("forward"))
    try:
        traced = torch_private.trace_aten(module, values)
    except Exception as error:  # tracing raises whatever an operator raises
        text = str(error).strip().splitlines()
        reason = f"the graph has no ATen form: {type(error).__name__}: {text[0] if text else ''}"
        return NearMiss("capture", reason, Source("forward"))
    normalise_stacks(traced.graph, _ROOT)
    _fix_module_numbers(traced.graph, [torch_private.source_name(node) for node in holders])
    state, model = {}, nn.Module()
    given: dict[str, str] = {}
    for number, (mine, theirs, real) in enumerate(
        zip(traced.graph.find_nodes(op="placeholder"), holders, inputs, strict=True)
    ):
        mine._rename(theirs.name)
        mine.target = mine.name
        path = _path(torch_private.source_name(theirs))
        if isinstance(real, torch.Tensor) and (path is not None or isinstance(real, nn.Parameter)):
            state[mine.name] = path or f"input_{number}"
            _attach(model, state[mine.name], real)
        else:
            given[mine.name] = f"args.{number}"
    traced.graph.lint()
    return Captured(
        graph_module=traced,
        inputs=given,
        parameters=state,
        constants={},
        args=tuple(inputs),
        kwargs={},
        module=model,
    )


def _fix_module_numbers(graph: fx.Graph, sources: Sequence[str]) -> None:
    """Make constants of floats that a module holds: its scale or epsilon, never the caller's own.

    With dynamic shapes dynamo passes every float as an input. Reading one as a number lets dynamo
    compile again when it changes, as it does for the other attributes of a module.
    """
    for node, source in zip(graph.find_nodes(op="placeholder"), sources, strict=True):
        for user in list(node.users):
            number = user.meta.get("val")
            if "_modules[" in source and isinstance(number, torch.SymFloat):
                float(number)
    for node in reversed(list(graph.nodes)):
        value = torch_private.known_number(node.meta.get("val"))
        if value is None or node.op != "call_function":
            continue
        for user in list(node.users):
            user.args, user.kwargs = _replaced((user.args, user.kwargs), node, value)
        graph.erase_node(node)


def _replaced(arguments: Any, node: fx.Node, value: float) -> Any:
    return fx.map_arg(arguments, lambda item: value if item is node else item)


def _path(source: str) -> str | None:
    """'layers.0.weight' for L['self']._modules['layers']._modules['0']._parameters['weight']."""
    found = _ROOT.match(source)
    if found is None or not any(f".{name}[" in source for name in ("_parameters", "_buffers")):
        return None
    keys = [a or b or c for a, b, c in _KEY.findall(source[found.end() :])]
    return ".".join(key for key in keys if key not in _CONTAINERS)


def _attach(model: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a tensor where `model.get_submodule` finds it; the tensor itself is shared."""
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in model._modules:
            model.add_module(owner, nn.Module())
        model = model.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        model.register_parameter(name, tensor)
    else:
        model.register_buffer(name, tensor)
