"""An attention core in plain torch, built from a site's description alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriter.ir.site import AddTerm, FillTerm, Scale, Softcap
from rewriter.passes.capture import Captured
from rewriter.passes.match import Match, Operand


def canonical(tensor: torch.Tensor, operand: Operand, sizes: dict[str, int]) -> torch.Tensor:
    """(batch, head, token, channel), from any layout; written apart from the matcher."""
    shape: list[int] = []
    roles: list[str] = []
    for size, names in zip(tensor.shape, operand.layout.dims, strict=True):
        rest = size
        for name in names:
            rest //= sizes.get(name, 1)
        shape.extend(sizes.get(name, rest) for name in names)
        roles.extend(names)
    tensor = tensor.reshape(shape or tensor.shape)
    heads = [r for r in roles if r in ("head", "kv_head", "group")]
    order = [r for r in ("batch", *heads, "token", "channel") if r in roles]
    tensor = tensor.permute([roles.index(r) for r in order])
    if not heads:
        tensor = tensor.unsqueeze(order.index("token"))
    return tensor if "batch" in roles else tensor.unsqueeze(0)


class _Values(fx.Interpreter):
    """Keeps every value of one run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n] = super().run_node(n)
        return self.kept[n]


def values_of(captured: Captured, inputs: dict[str, torch.Tensor]) -> dict[fx.Node, Any]:
    """Every node's value on real inputs, keyed by the last part of the input's path."""
    args: list[torch.Tensor] = []
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        known = captured.parameter(node.name)
        if known is None:
            known = inputs[captured.inputs[node.name].removeprefix("kwargs.")]
        args.append(known)
    interpreter = _Values(captured.graph_module)
    with torch.no_grad():
        interpreter.run(*args)
    return interpreter.kept


def core_from_description(item: Match, values: dict[fx.Node, Any]) -> torch.Tensor:
    """The attention that the site describes, in plain torch."""
    site, nodes = item.site, item.nodes
    heads = {"head": site.heads.query, "kv_head": site.heads.key_value, "group": site.heads.group}
    q, k, v = (canonical(values[o.node], o, heads) for o in (nodes.query, nodes.key, nodes.value))
    k, v = (t.repeat_interleave(site.heads.query // t.shape[1], 1) for t in (k, v))
    for step in site.score:
        if isinstance(step, Scale) and step.on == "query":
            q = q * step.factor
        if isinstance(step, Scale) and step.on == "key":
            k = k * step.factor
    scores = q @ k.transpose(-1, -2)
    for step in site.score:
        if isinstance(step, Scale) and step.on == "scores":
            scores = scores * step.factor
        elif isinstance(step, Softcap):
            scores = step.cap * torch.tanh(scores / step.cap)
        elif isinstance(step, AddTerm):
            scores = scores + step.factor * _aligned(values, nodes.terms[step.index], scores)
        elif isinstance(step, FillTerm):
            term = _aligned(values, nodes.terms[step.index], scores)
            scores = scores.masked_fill(term != step.keep, step.value)
    if site.causal_flag:
        n = scores.shape[-1]
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


def _aligned(values: dict[fx.Node, Any], term: Operand, scores: torch.Tensor) -> torch.Tensor:
    """A term as something that broadcasts against (B, H, Nq, Nk)."""
    tensor = values[term.node]
    if ("batch", "head") in term.layout.dims:
        return tensor.unflatten(0, scores.shape[:2])
    return tensor
