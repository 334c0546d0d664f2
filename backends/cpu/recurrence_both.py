"""Both directions with decay, from two causal scans: up to the token, and the later ones backwards.

Backwards the state is read before the token is written and decays after it, which is an exclusive
scan of keys times exp(g). The normaliser is a column of ones in the values. Catalogue: linear.md
section 2 (LIN-S, bidirectional).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.inputs import RecurrenceGrads, RecurrenceInputs
from rewriter.ir.recurrence import Recurrence

Forward = Callable[[Recurrence, RecurrenceInputs], tuple[Tensor, Tensor]]
Backward = Callable[[Recurrence, RecurrenceInputs, Tensor, Tensor | None], RecurrenceGrads]


def scans(spec: Recurrence) -> tuple[Recurrence, Recurrence]:
    """The causal scans of a bidirectional spec with decay: ahead, and behind on flipped tokens."""
    width = spec.state_width
    ahead = replace(spec, causal=True, normaliser="none", value_dim=width)
    return ahead, replace(ahead, read="exclusive")


@dataclass(frozen=True)
class _Both:
    """Inputs of the two scans in float32, and exp(g) with one number a token, (B, Hkv, N, 1)."""

    ahead: RecurrenceInputs
    behind: RecurrenceInputs
    left: Tensor


def forward_both(spec: Recurrence, x: RecurrenceInputs, run: Forward) -> tuple[Tensor, Tensor]:
    """Outputs, and the end state of the scan ahead."""
    both = _inputs(spec, x)
    read, end = _read(spec, both, run)
    return _normalised(spec, read).to(x.v.dtype), end


def backward_both(
    spec: Recurrence, x: RecurrenceInputs, grad_out: Tensor, run: Forward, back: Backward
) -> RecurrenceGrads:
    """Gradients of the inputs that were given."""
    both = _inputs(spec, x)
    grad = grad_out.float()
    if spec.normaliser == "ones":
        read, _ = _read(spec, both, run)
        mass = read[..., -1:]
        inverse = torch.where(mass > 0, mass, torch.inf).reciprocal()
        of_mass = -(grad * read[..., :-1]).sum(-1, keepdim=True) * inverse.square()
        grad = torch.cat((grad * inverse, of_mass), -1)
    one, two = scans(spec)
    ahead = back(one, both.ahead, grad, None)
    behind = back(two, both.behind, grad.flip(2), None)
    later = behind.k.flip(2)
    assert ahead.decay is not None and behind.decay is not None and x.decay is not None
    step = (later * both.ahead.k * both.left).sum(-1)
    if spec.decay == "head":
        decay = ahead.decay + behind.decay + step.sum((0, 2))
    else:
        decay = ahead.decay + behind.decay.flip(2) + step
    v = (ahead.v + behind.v.flip(2))[..., : spec.value_dim]
    return RecurrenceGrads(
        (ahead.q + behind.q.flip(2)).to(x.q.dtype),
        (ahead.k + later * both.left).to(x.k.dtype),
        v.to(x.v.dtype),
        decay.to(x.decay.dtype),
        start=None if x.start is None else torch.zeros_like(x.start),
    )


def _inputs(spec: Recurrence, x: RecurrenceInputs) -> _Both:
    assert x.decay is not None
    q, k, v, g = x.q.float(), x.k.float(), x.v.float(), x.decay.float()
    if spec.normaliser == "ones":
        v = F.pad(v, (0, 1), value=1.0)
    left = g.exp()[None, :, None, None] if spec.decay == "head" else g.exp().unsqueeze(-1)
    cu = x.cu_seqlens
    backwards = RecurrenceInputs(
        q.flip(2),
        (k * left).flip(2),
        v.flip(2),
        g if spec.decay == "head" else g.flip(2),
        cu_seqlens=None if cu is None else q.shape[2] - cu.flip(0),
    )
    return _Both(RecurrenceInputs(q, k, v, g, cu_seqlens=cu), backwards, left)


def _read(spec: Recurrence, both: _Both, run: Forward) -> tuple[Tensor, Tensor]:
    one, two = scans(spec)
    read, end = run(one, both.ahead)
    return read + run(two, both.behind)[0].flip(2), end


def _normalised(spec: Recurrence, read: Tensor) -> Tensor:
    if spec.normaliser == "none":
        return read
    mass = read[..., -1:]
    return read[..., :-1] / torch.where(mass > 0, mass, torch.inf)
