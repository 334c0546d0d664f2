"""Which nodes of an owner's graph are one call of a leaf child, so that it can be called again."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch.fx import Node

from rewriter.passes.capture import Captured
from rewriter.passes.provenance import module_path, module_stack


@dataclass(frozen=True)
class ChildCall:
    """One call `self.module(input)` of a child with one tensor input and one output."""

    module: str
    input: Node
    output: Node


def child_calls(captured: Captured, region: Set[Node]) -> dict[Node, ChildCall]:
    """Map every node that belongs to a re-raisable child call to that call.

    A child is called again as a module when all its nodes lie outside the cores (`region`), read
    exactly one tensor from outside (parameters and sizes aside) and give exactly one to it.
    Of nested candidates the outermost wins. Children called more than once are left inline.
    """
    groups: dict[str, list[Node]] = defaultdict(list)
    for node in captured.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        parts = module_path(node).split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path:
                groups[path].append(node)
    calls: dict[Node, ChildCall] = {}
    for path in sorted(groups, key=lambda p: p.count(".")):
        nodes = groups[path]
        if any(node in calls or node in region for node in nodes):
            continue
        call = _single(path, nodes, captured)
        if call is not None:
            for node in nodes:
                calls[node] = call
    return calls


def _single(path: str, nodes: list[Node], captured: Captured) -> ChildCall | None:
    if len({call for node in nodes for p, call in module_stack(node) if p == path}) != 1:
        return None
    members = set(nodes)
    known = {*captured.parameters, *captured.constants}
    inputs: list[Node] = []
    outputs: list[Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            outside = source not in members and source.name not in known
            tensor = isinstance(source.meta.get("val"), torch.Tensor)
            if outside and tensor and source not in inputs:
                inputs.append(source)
        if any(user not in members for user in node.users):
            outputs.append(node)
    if len(inputs) != 1 or len(outputs) != 1:
        return None
    if not isinstance(outputs[0].meta.get("val"), torch.Tensor):
        return None
    if not _takes_one(path, captured):
        return None
    return ChildCall(path, inputs[0], outputs[0])


def _takes_one(path: str, captured: Captured) -> bool:
    """Whether the child can be called with one argument: it may need numbers beside the tensor."""
    if captured.module is None:
        return True
    try:
        inspect.signature(captured.module.get_submodule(path).forward).bind(None)
    except (AttributeError, TypeError, ValueError):
        return False
    return True
