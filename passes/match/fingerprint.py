"""A hash of what an owner computes: equal for layers that differ only in their parameters."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.provenance import module_stack


def fingerprint(owner: str, anchor: fx.Node, view: View) -> str:
    """sha256 over the owner's slice of the graph, in the call that contains `anchor`.

    Operators, arguments, constants and shapes count; names of nodes and size symbols do not, and
    parameters count by their name inside the owner, their shape and dtype.
    """
    call = dict(module_stack(anchor)).get(owner, 0)
    writer = _Writer(owner, view)
    for node in view.graph.nodes:
        if node.op != "call_function" or _is_size(node):
            continue
        if owner and dict(module_stack(node)).get(owner) != call:
            continue
        writer.node(node)
    return hashlib.sha256("\n".join(writer.lines).encode()).hexdigest()


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


@dataclass
class _Writer:
    owner: str
    view: View
    lines: list[str] = field(default_factory=list)
    _names: dict[fx.Node, str] = field(default_factory=dict)
    _symbols: dict[str, str] = field(default_factory=dict)

    def node(self, node: fx.Node) -> None:
        args = ", ".join(self._argument(a) for a in node.args)
        kwargs = ", ".join(f"{k}={self._argument(v)}" for k, v in sorted(node.kwargs.items()))
        self._names[node] = f"%{len(self._names)}"
        self.lines.append(f"{self._names[node]} = {node.target}({args}; {kwargs})")

    def _argument(self, item: Any) -> str:
        if isinstance(item, fx.Node):
            return self._reference(item)
        if isinstance(item, list | tuple):
            return "[" + ", ".join(self._argument(x) for x in item) + "]"
        if isinstance(item, torch.SymInt):
            return self._expression(item)
        return repr(item)

    def _reference(self, node: fx.Node) -> str:
        if _is_size(node):
            return self._expression(node.meta["val"])
        if node not in self._names:
            self._names[node] = f"%{len(self._names)}"
            self.lines.append(f"{self._names[node]} = {self._outside(node)}")
        return self._names[node]

    def _outside(self, node: fx.Node) -> str:
        """An input of the slice: a parameter by its relative name, anything else by its shape."""
        captured = self.view.captured
        val = value(node)
        shape = "?" if val is None else ", ".join(self._expression(s) for s in val.shape)
        kind = f"({shape}) {val.dtype if val is not None else ''}"
        if node.name in captured.parameters:
            name = captured.parameters[node.name]
            prefix = f"{self.owner}." if self.owner else ""
            inside = name.startswith(prefix)
            return f"parameter {'.' if inside else ''}{name.removeprefix(prefix)} {kind}"
        if node.name in captured.constants:
            content = captured.constants[node.name].detach().cpu().flatten().tolist()
            return f"constant {content!r} {kind}"
        return f"input {kind}"

    def _expression(self, size: Any) -> str:
        def rename(found: re.Match[str]) -> str:
            return self._symbols.setdefault(found.group(), f"n{len(self._symbols)}")

        return re.sub(r"[a-z]+\d+", rename, str(size))
