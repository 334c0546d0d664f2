"""Sink tokens: the first valid keys of each row, kept for ever.

They are counted over valid keys, so a left-padded row has the same sinks as the same row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewriter.ir.state import State


@dataclass(frozen=True)
class Sinks:
    """`k` (B, Hkv, slots, Dk), `v` (B, Hkv, slots, Dv), `at` (B, slots) positions, -1 if empty."""

    k: torch.Tensor
    v: torch.Tensor
    at: torch.Tensor


def gather_sinks(
    slots: int,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    state: State | None,
) -> Sinks:
    """Sinks after n new keys: the old ones, then the first valid new ones in the free slots."""
    if state is None:
        if valid is None:
            return _leading(slots, k, v)
        old = _empty(slots, k, v)
        seen = old.at.new_zeros(k.shape[0])
    else:
        old = Sinks(state["sink_k"], state["sink_v"], state["sink_at"])
        seen = state["seen"]
        # Reading the flag is free on a CPU and a stall elsewhere, where the update runs instead.
        if slots == 0 or (k.device.type == "cpu" and bool((old.at[:, -1] >= 0).all())):
            return old
    return _fill(old, k, v, valid, seen)


def _leading(slots: int, k: torch.Tensor, v: torch.Tensor) -> Sinks:
    free = max(0, slots - k.shape[-2])
    at = F.pad(torch.arange(slots - free, device=k.device), (0, free), value=-1)
    return Sinks(
        F.pad(k[:, :, :slots], (0, 0, 0, free)),
        F.pad(v[:, :, :slots], (0, 0, 0, free)),
        at.expand(k.shape[0], slots),
    )


def _empty(slots: int, k: torch.Tensor, v: torch.Tensor) -> Sinks:
    batch, heads = k.shape[:2]
    return Sinks(
        k.new_zeros(batch, heads, slots, k.shape[-1]),
        v.new_zeros(batch, heads, slots, v.shape[-1]),
        torch.full((batch, slots), -1, dtype=torch.int64, device=k.device),
    )


def _fill(
    old: Sinks, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None, seen: torch.Tensor
) -> Sinks:
    batch, slots = old.at.shape
    if valid is None:
        valid = torch.ones(batch, k.shape[-2], dtype=torch.bool, device=k.device)
    filled = (old.at >= 0).sum(-1, keepdim=True)
    rank = valid.long().cumsum(-1) - 1 + filled
    slot = torch.arange(slots, device=k.device)[None, :, None]
    hit = valid[:, None, :] & (rank[:, None, :] == slot)
    found, index = hit.any(-1), hit.to(torch.uint8).argmax(-1)

    def take(new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        picked = new.gather(2, index[:, None, :, None].expand_as(before))
        return torch.where(found[:, None, :, None], picked.to(before.dtype), before)

    at = torch.where(found, seen[:, None] + index, old.at)
    return Sinks(take(k, old.k), take(v, old.v), at)
