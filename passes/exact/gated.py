"""Gated MLP blocks whose projections, activation and product run as one kernel.

A block is what the matcher of MLP blocks found: its activation is named by evaluation. In bfloat16
the down projection is part of the kernel, unless somebody watches it or the block is too large;
else it stays the module that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter.backends.cpu import gated_block
from rewriter.backends.cpu import linear as generated
from rewriter.backends.ops.regions import gated_linear, plain, whole_gated
from rewriter.ir.mlp import ChannelMap, MlpSite
from rewriter.passes.exact import fused
from rewriter.passes.exact.linears import FasterLinear
from rewriter.plan import FusedModule

HIDDEN = 3 * 2**23  # bytes of hidden activations at a time


@dataclass(frozen=True)
class Side:
    """One of the projections: a module inside the owner and rows of its weight."""

    module: str
    transposed: bool
    rows: tuple[int, int, int]
    bias: bool

    def read(self, owner: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        module: Any = owner.get_submodule(self.module)
        rows = slice(*self.rows)
        weight = module.weight.t() if self.transposed else module.weight
        return weight[rows], module.bias[rows] if self.bias else None


@dataclass(frozen=True)
class GatedRegion:
    """A block: down(f(gate(x)) * up(x))."""

    gate: Side
    up: Side
    down: Side
    activation: str

    def tensors(self, owner: nn.Module) -> tuple[torch.Tensor | None, ...]:
        return (*self.gate.read(owner), *self.up.read(owner))

    def watched(self, owner: nn.Module) -> Sequence[nn.Module]:
        down = set(owner.get_submodule(self.down.module).modules())
        return [m for m in owner.modules() if m is not owner and m not in down]

    def run(self, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate.read(owner), self.up.read(owner)
        down = owner.get_submodule(self.down.module)
        width = x.shape[-1]
        count = x.numel() // width
        by_rows, parts = _by_rows(down), 1
        if by_rows:
            last = self.down.read(owner)
            if plain(x, *last):
                whole = whole_gated(x, gate, up, last, self.activation)
                if whole is not None:
                    return whole
            # Small tensors are kept by the allocator; for large ones it asks for fresh pages.
            parts = min(-(-count * gate[0].shape[0] * x.element_size() // HIDDEN), count)
        if parts <= 1:
            out: torch.Tensor = down(gated_linear(x, gate, up, self.activation))
            return out
        pieces = x.reshape(count, width).tensor_split(parts)
        done = [down(gated_linear(rows, gate, up, self.activation)) for rows in pieces]
        return torch.cat(done).reshape(*x.shape[:-1], -1)


def find(model: nn.Module, sites: Sequence[MlpSite]) -> list[FusedModule]:
    """Every gated MLP block of a model, with what will be done about it and why."""
    known: dict[Any, FusedModule] = {}
    out = []
    for site in {s.fqn: s for s in sites if s.gate is not None}.values():  # runs share an owner
        owner = model.get_submodule(site.fqn)
        key = (type(owner), site.core_hash(), next(owner.parameters()).dtype, _plain(owner))
        if key not in known:
            known[key] = _planned(owner, site)
        out.append(known[key].model_copy(update={"fqn": site.fqn}))
    return out


def apply(model: nn.Module, layers: Sequence[FusedModule]) -> None:
    """Put the planned blocks of a model on the kernel, in place.

    Raises:
        UsageError: the model has no such module.
    """
    for layer in layers:
        if layer.status != "refused" and layer.kind == "gated":
            region = _region(MlpSite.from_json(layer.facts))
            fused.put(fused.checked(model, layer), region, layer.gains)


def _planned(owner: nn.Module, site: MlpSite) -> FusedModule:
    layer = FusedModule(fqn=site.fqn, kind="gated")
    reason = _unfit(owner, site)
    if reason is None:
        region = _region(site)
        dtype = region.gate.read(owner)[0].dtype
        error = fused.proof(owner, region, site.input, dtype)
        if not isinstance(error, str):
            name = f"{site.activation.name} {site.input} {site.hidden} {site.output}"
            name += f" {site.gate_layout} {generated.precision(dtype)}"
            gains = fused.gains_of(owner, region, site.input, dtype, name, _source(dtype))
            if gains:
                return layer.model_copy(
                    update={"error": error, "gains": gains, "facts": site.to_json()}
                )
            error = "one kernel was not measured to be faster on this machine"
        reason = error
    return layer.model_copy(update={"status": "refused", "reason": reason})


def _unfit(owner: nn.Module, site: MlpSite) -> str | None:
    activation = site.activation
    if site.experts or site.kind == "conv1x1":
        return "its projections are no plain linear layers"
    if activation.name not in generated.GATES or activation.parameters or activation.scale != 1.0:
        return f"there is no kernel for the activation {activation.describe()}"
    if any(m.weight != f"{m.module}.weight" for m in site.maps):
        return "its projections are no modules of their own"
    if not site.fqn or any(not m.module.startswith(f"{site.fqn}.") for m in site.maps):
        return "its projections are not all inside one module"
    if not _plain(owner):
        return "somebody's hooks are inside it"
    region = _region(site)
    gate, up = region.gate.read(owner)[0], region.up.read(owner)[0]
    if gate.device.type != "cpu" or gate.dtype not in generated.NAMES:
        return f"there is no generated code for {gate.dtype} on {gate.device.type}"
    if (gate.dtype, gate.shape, gate.stride()) != (up.dtype, up.shape, up.stride()):
        return "its two projections lie in different orders"
    kernel = generated.find(gate.dtype)
    if isinstance(kernel, str):
        return kernel
    return None if kernel.tiles is not None else "this processor has no matrix tiles"


def _source(dtype: torch.dtype) -> str:
    whole = gated_block.source_of() if dtype == torch.bfloat16 else ""
    return generated.source_of(dtype) + whole


def _by_rows(down: nn.Module) -> bool:
    """Whether a projection is a plain one that nobody watches, so that it may run several times."""
    kind = type(down)
    plain = kind.forward is nn.Linear.forward or kind.__bases__[0] is FasterLinear
    hooked = down._forward_hooks or down._forward_pre_hooks or "forward" in down.__dict__
    return plain and not hooked


def _plain(owner: nn.Module) -> bool:
    inner = [m for m in owner.modules() if m is not owner]
    return not any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def _region(site: MlpSite) -> GatedRegion:
    assert site.gate is not None
    inside = f"{site.fqn}."

    def side(part: ChannelMap) -> Side:
        name = part.module.removeprefix(inside)
        return Side(name, part.transposed, part.rows, part.bias is not None)

    return GatedRegion(side(site.gate), side(site.up), side(site.down), site.activation.name)
