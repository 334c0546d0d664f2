"""One token: the near part with as few operations as possible.

The same numbers as `near.attend` for n = 1, but sinks, window and the new token lie in one buffer,
so one product scores them all. Decoding is bound by the number of torch calls, not by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewriter.backends.reference.near import Context
from rewriter.backends.reference.precision import wide
from rewriter.backends.reference.sinks import gather_sinks
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.state import State


@dataclass(frozen=True)
class Step:
    """`logits` (B, Hkv, G, slots + window), -inf where hidden, float32; `values` beside them."""

    logits: torch.Tensor
    values: torch.Tensor
    context: Context
    padding: bool

    def softmax(self) -> torch.Tensor:
        """(B, H, 1, Dv); zero for a query that sees nothing."""
        weight = F.softmax(self.logits, -1)
        if self.padding:
            weight = weight.nan_to_num(0.0)
        return (weight @ self.values).flatten(1, 2).unsqueeze(2)

    def masses(self) -> torch.Tensor:
        """(B, H, 1, Dv + 1): numerator and denominator with the largest logit taken out."""
        top = self.logits.amax(-1, keepdim=True)
        if self.padding:
            top = torch.where(top == -torch.inf, 0.0, top)
        weight = (self.logits - top).exp()
        both = torch.cat((weight @ self.values, weight.sum(-1, keepdim=True)), -1)
        return both.flatten(1, 2).unsqueeze(2)


def serves(spec: WindowAttention, n: int, bias: torch.Tensor | None, state: State | None) -> bool:
    """Whether `attend_one` covers the call: a plain decode step."""
    plain = spec.causal and spec.limit is None and not spec.hidden and not spec.mean
    return n == 1 and plain and bias is None and state is not None


def attend_one(
    spec: WindowAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    state: State,
) -> Step:
    """Score one new token. q (B, H, 1, Dk), k and v (B, Hkv, 1, D), valid (B, 1) or None."""
    B, H, _, Dk = q.shape
    Hkv, slots = k.shape[1], spec.sinks
    before = state["ring_valid"]
    ok = before.new_ones(B, 1) if valid is None else valid
    sinks = gather_sinks(slots, k, v, valid, state)
    if slots:
        # A sink counts once it has left the window.
        left = (state["seen"] - spec.window)[:, None]
        sunk = (sinks.at >= 0) & (sinks.at <= left)
        keys = torch.cat((sinks.k, state["ring_k"], k), 2)
        values = torch.cat((sinks.v, state["ring_v"], v), 2)
        seen = torch.cat((sunk, before, ok), 1)
    else:
        keys, values = torch.cat((state["ring_k"], k), 2), torch.cat((state["ring_v"], v), 2)
        seen = torch.cat((before, ok), 1)
    rows = wide(q).view(B, Hkv, H // Hkv, Dk) * spec.scale
    logits = rows @ wide(keys).transpose(-1, -2)
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    logits = logits.masked_fill(seen.logical_not()[:, None, None, :], -torch.inf)
    context = Context(keys[:, :, slots:], values[:, :, slots:], seen[:, slots:], sinks)
    return Step(logits, wide(values), context, valid is not None)
