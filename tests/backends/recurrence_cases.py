"""Random calls of `Recurrence`, for every variant of the spec."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import BATCH, KV_HEADS


@dataclass(frozen=True)
class Call:
    """Tensors of one call; `state` is None for a call that starts a sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    add: Tensor | None = None
    bonus: Tensor | None = None
    gate: Tensor | None = None
    valid: Tensor | None = None
    state: dict[str, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Call:
        """Every floating tensor in `dtype`."""
        changed: dict[str, Any] = {}
        for name, t in self.tensors().items():
            if t.is_floating_point():
                changed[name] = t.to(dtype)
        if self.state is not None:
            changed["state"] = {name: t.to(dtype) for name, t in self.state.items()}
        return replace(self, **changed)

    def double(self) -> Call:
        return self.to(torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """The given tensors apart from the state, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "state"}
        return {name: t for name, t in named.items() if t is not None}

    def keywords(self) -> dict[str, Tensor]:
        """The tensors that a kernel takes by keyword."""
        return {n: t for n, t in self.tensors().items() if n not in ("q", "k", "v")}

    def part(self, spec: Recurrence, at: slice, state: dict[str, Tensor] | None) -> Call:
        """Some tokens of the call, after `state`."""
        changed: dict[str, Any] = {"state": state}
        for name, t in self.tensors().items():
            if name == "bonus" or (name == "decay" and spec.decay == "head"):
                continue
            changed[name] = t[:, at] if name == "valid" else t[:, :, at]
        return replace(self, **changed)


def specs(key_dim: int, value_dim: int, scale: float = 0.7) -> list[Recurrence]:
    """Every variant that the spec allows."""
    out = []
    for decay, correction, read, bonus, normaliser, causal in itertools.product(
        ("none", "head", "token", "channel"),
        ("none", "delta", "untied"),
        ("inclusive", "exclusive"),
        (False, True),
        ("none", "ones", "max"),
        (True, False),
    ):
        chosen: tuple[Any, ...] = (decay, correction, read, bonus, normaliser, causal)
        try:
            out.append(Recurrence(key_dim, value_dim, *chosen, scale))
        except ValueError:
            continue
    return out


def call_of(
    spec: Recurrence,
    n: int,
    *,
    seed: int = 0,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    strength: float = 1.0,
    state: bool = False,
) -> Call:
    """A float32 call; `strength` is the mean of -g. Weights of a normalised read are positive."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    lead = (batch, kv_heads, n)
    q = normal(batch, kv_heads * group, n, spec.key_dim)
    k = F.normalize(normal(*lead, spec.key_dim), dim=-1)
    if spec.normaliser == "ones":
        q, k = q.abs(), k.abs()
    call = Call(q, k, normal(*lead, spec.value_dim))
    shapes = {"head": (kv_heads,), "token": lead, "channel": (*lead, spec.key_dim)}
    if spec.decay != "none":
        steps = -torch.empty(shapes[spec.decay]).exponential_(generator=gen) * strength
        call = replace(call, decay=steps)
    if spec.correction == "delta":
        call = replace(call, beta=torch.rand(lead, generator=gen))
    if spec.correction == "untied":
        # b = -0.9 a of unit length shrinks what it reads, so the state stays bounded.
        erase = F.normalize(normal(*lead, spec.key_dim), dim=-1)
        add = -0.9 * erase + 0.05 * normal(*lead, spec.key_dim)
        call = replace(call, erase=erase, add=add)
    if spec.bonus:
        bonus = normal(kv_heads, spec.key_dim)
        call = replace(call, bonus=bonus.abs() if spec.normaliser == "ones" else bonus)
    if spec.normaliser == "max":
        call = replace(call, gate=3 * normal(*lead))
    if state:
        sizes = {BATCH: batch, KV_HEADS: kv_heads}
        held = {}
        for t in spec.state_spec().tensors:
            held[t.name] = normal(*(int(sizes.get(s, s)) for s in t.shape))
        if spec.normaliser == "ones":
            held["S"] = held["S"].abs()
        call = replace(call, state=held)
    return call


def zero_state(spec: Recurrence, call: Call, rows: int | None = None) -> dict[str, Tensor]:
    """The state of a sequence that starts here."""
    sizes = {BATCH: call.k.shape[0] if rows is None else rows, KV_HEADS: call.k.shape[1]}
    return {
        t.name: torch.full([int(sizes.get(s, s)) for s in t.shape], t.fill)
        for t in spec.state_spec().tensors
    }
