"""What every form of the recurrence works on: one causal scan, in one floating dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """Inputs of a causal scan after padding, scale and normaliser have been folded in.

    Attributes:
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, W), all in the same dtype.
        g: log decay <= 0, None, (B, Hkv, n, 1) or (B, Hkv, n, Dk).
        beta: (B, Hkv, n, 1) of the delta rule, or None.
        erase, add: (B, Hkv, n, Dk), the vectors a and b of an untied correction, or None.
        bonus: (Hkv, Dk) or None.
        exclusive: a token reads the state before its own decay and write.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    add: Tensor | None = None
    bonus: Tensor | None = None
    exclusive: bool = False

    @property
    def group(self) -> int:
        """Query heads per state head."""
        return self.q.shape[1] // self.k.shape[1]

    def zero_state(self) -> Tensor:
        batch, heads, _, width = self.k.shape
        return self.v.new_zeros(batch, heads, width, self.v.shape[-1])


def sum_dtype(x: Tensor) -> torch.dtype:
    """Running sums of log decays lose the small steps after a large one; keep them in float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
