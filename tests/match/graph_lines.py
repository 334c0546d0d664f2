"""A captured graph as lines of text that do not depend on node names and size symbols."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from rewriter.passes.capture import Captured
from rewriter.passes.provenance import module_stack


def graph_lines(captured: Captured) -> list[str]:
    """One line a node: target, arguments, module path and the kind of the result."""
    number: dict[fx.Node, int] = {}
    symbols: dict[str, str] = {}

    def renamed(item: Any) -> str:
        def rename(found: re.Match[str]) -> str:
            return symbols.setdefault(found.group(), f"n{len(symbols)}")

        return re.sub(r"\b[su]\d+\b", rename, str(item))

    def shown(item: Any) -> str:
        if isinstance(item, fx.Node):
            if item.name in captured.parameters:
                return f"parameter {captured.parameters[item.name]}"
            if item.name in captured.constants:
                return f"constant {captured.constants[item.name]}"
            return f"input {captured.inputs.get(item.name, '')}{number.get(item)}"
        if isinstance(item, list | tuple):
            return "[" + ", ".join(map(shown, item)) + "]"
        return repr(item)

    lines = []
    for node in captured.graph_module.graph.nodes:
        if node.name in captured.constants:
            continue
        number[node] = len(number)
        val = node.meta.get("val")
        kind = (val.shape, val.stride(), val.dtype) if isinstance(val, torch.Tensor) else ""
        arguments = f"{shown(node.args)} { {k: shown(v) for k, v in node.kwargs.items()} }"
        where = module_stack(node) if node.op == "call_function" else ""
        lines.append(f"{node.op} {node.target} {arguments} {where} {renamed(kind)}")
    return lines
