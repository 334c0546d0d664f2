"""Normalisers: a constant column 1 in the values, and the running maximum of mLSTM.

With 'max' the weight exp(i_j + sum of g) of a key may be any size, so everything is stored times
exp(-m_t). The maxima m_t = max(g_t + m_{t-1}, i_t) come first, by doubling; then
g_t + m_{t-1} - m_t and i_t - m_t are a decay and an input weight without positive exponents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def with_ones(v: Tensor, valid: Tensor | None = None) -> Tensor:
    """[v, 1] in at least float32, zero at padding. v (B, Hkv, n, Dv), valid (B | 1, n) or None."""
    out = F.pad(v if v.dtype == torch.float64 else v.float(), (0, 1), value=1.0)
    return out if valid is None else out.masked_fill(~valid[:, None, :, None], 0.0)


def normalise(read: Tensor) -> Tensor:
    """Divide by the last column; 0 where it is not positive."""
    mass = read[..., -1:]
    return read[..., :-1] / torch.where(mass > 0, mass, torch.inf)


def normalise_max(read: Tensor, top: Tensor) -> Tensor:
    """Divide by max(|last column|, exp(-top)). top (B, H, n) or broadcastable."""
    # exp(-top) would overflow where the output is 0 anyway.
    floor = -700.0 if read.dtype == torch.float64 else -80.0
    least = (-top.clamp(min=floor)).exp().unsqueeze(-1)
    return read[..., :-1] / torch.maximum(read[..., -1:].abs(), least)


def running_max(gate: Tensor, g: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maxima m_t and m_{t-1}.

    Args:
        gate: (B, Hkv, n) log input gates, -inf allowed. g: (B, Hkv, n) log decays or None.
        before: (B, Hkv), m before the first token, or None for -inf.

    Returns:
        Two (B, Hkv, n) tensors.
    """
    n = gate.shape[-1]
    top = gate
    total = torch.zeros_like(gate) if g is None else g
    shift = 1
    while shift < n:
        reached = total[..., shift:] + top[..., :-shift]
        top = torch.maximum(top, F.pad(reached, (shift, 0), value=-torch.inf))
        total = total + F.pad(total[..., :-shift], (shift, 0))
        shift *= 2
    first = gate.new_full(gate.shape[:-1], -torch.inf) if before is None else before
    top = torch.maximum(top, total + first.unsqueeze(-1))
    return top, torch.cat((first.unsqueeze(-1), top[..., :-1]), -1)


def stabilised(
    gate: Tensor, g: Tensor | None, top: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Decay (B, Hkv, n) <= 0 and input weight (B, Hkv, n) <= 1 at the scale exp(-top)."""
    finite = torch.where(top == -torch.inf, 0.0, top)
    decay = (previous if g is None else g + previous) - finite
    return decay.clamp(max=0.0), (gate - finite).exp()
