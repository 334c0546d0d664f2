"""An MLP in plain torch, built from a site's description alone; functions are transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from transformers.activations import ACT2FN

from rewriter.ir.mlp import ChannelMap
from rewriter.passes.capture import Captured
from rewriter.passes.match.mlp import MlpMatch

_OTHERS = {
    "gelu_tanh": "gelu_new",
    "elu": torch.nn.functional.elu,
    "identity": lambda x: x,
}


def _parameter(captured: Captured, name: str) -> torch.Tensor:
    holder = next(n for n, fqn in captured.parameters.items() if fqn == name)
    tensor = captured.parameter(holder)
    assert tensor is not None
    return tensor.detach()


def _apply(captured: Captured, part: ChannelMap, x: torch.Tensor) -> torch.Tensor:
    weight = _parameter(captured, part.weight)
    weight = weight.flatten(1) if part.spelling == "conv1x1" else weight
    if part.transposed:
        weight = weight.mT
    rows = slice(*part.rows)
    out = x @ weight[rows].mT
    return out if part.bias is None else out + _parameter(captured, part.bias)[rows]


def _function(name: str, x: torch.Tensor) -> torch.Tensor:
    known = _OTHERS.get(name, name)
    out: torch.Tensor = ACT2FN[known](x) if isinstance(known, str) else known(x)
    return out


def mlp_from_description(
    item: MlpMatch, captured: Captured, values: dict[fx.Node, Any]
) -> torch.Tensor:
    """The block's output as the graph lays it out, from the value of its input node."""
    site, nodes = item.site, item.nodes
    x = values[nodes.input].movedim(nodes.input_channel, -1)
    if site.experts:
        return _experts(item, captured, values)
    up = _apply(captured, site.up, x)
    if site.activation.name == "swiglu_clamped":
        assert site.gate is not None
        limit, beta = site.activation.parameters["limit"], site.activation.parameters["beta"]
        gate = _apply(captured, site.gate, x).clamp(max=limit)
        up = up.clamp(-limit, limit) + site.activation.parameters["shift"]
        hidden = gate * torch.sigmoid(beta * gate) * up
    elif site.gate is not None:
        hidden = _function(site.activation.name, _apply(captured, site.gate, x)) * up
    else:
        hidden = _function(site.activation.name, up)
    out = _apply(captured, site.down, hidden * site.activation.scale)
    return out.movedim(-1, nodes.output_channel).reshape(values[nodes.output].shape)


def _experts(item: MlpMatch, captured: Captured, values: dict[fx.Node, Any]) -> torch.Tensor:
    """(experts, rows, channels) or (rows, experts, channels): every expert on its own rows."""
    site, nodes = item.site, item.nodes
    x, wanted = values[nodes.input], values[nodes.output]
    leading = wanted.shape[0] == site.experts
    outs = []
    for expert in range(site.experts):
        rows = x[expert] if x.dim() == 3 else x
        up, gate = (
            rows @ _parameter(captured, p.weight)[expert][:, slice(*p.rows)]
            for p in (site.up, site.gate)
            if p is not None
        )
        hidden = _function(site.activation.name, gate) * up
        outs.append(hidden @ _parameter(captured, site.down.weight)[expert])
    return torch.stack(outs, 0 if leading else 1)
