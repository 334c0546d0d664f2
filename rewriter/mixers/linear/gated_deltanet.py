"""gated_deltanet: a state that is corrected instead of added to (catalogue gated_deltanet).

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = silu(W_z x_t) * norm(q_t^T S_t)

with q, k behind a short convolution and of length 1 (q over sqrt(D_k)), b_t = sigmoid(W_b x_t)
and log a_t = -exp(r) softplus(W_a x_t + d). What a key stored before is replaced, not summed up, so
the state recalls better than a decayed sum. Keys of length 1 and b < 1 keep it contractive; without
them it overflows within some hundred tokens.

The start: convolutions are the identity (and without their silu, which cannot be one), b = 1/2,
half of the state left after 4,096 tokens, the output gate 1. The length of the teacher's keys is
lost, which matters least where the model normalises them itself. Has to be distilled.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import Tensor

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import HEADS, KV_HEADS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.gates import SlowDecay, TokenGate
from rewriter.mixers.shared.recurrent import ConvOptions, GatedRecurrence
from rewriter.mixers.tokens import Tokens, run


class GatedDeltaNetOptions(ConvOptions):
    __doc__ = ConvOptions.__doc__


class GatedDeltaNet(GatedRecurrence):
    info = MixerInfo(
        name="gated_deltanet",
        family="linear",
        tier="distilled",
        summary="delta rule with a decay per token: keys overwrite what they stored; fixed state",
        maths="S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = z_t norm(q_t S_t)",
        source="gated_deltanet (Gated Delta Networks), as in Qwen3-Next",
        directions=frozenset({"causal"}),
    )
    Options = GatedDeltaNetOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.decay = SlowDecay(site)
        self.beta = TokenGate(site.hidden_dim, site.heads.key_value, 0.0)

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        heads = site.heads
        scale = heads.key_dim**-0.5
        return Recurrence(
            heads.key_dim, heads.value_dim, decay="token", correction="delta", scale=scale
        )

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return HEADS * VALUE_DIM + 2 * KV_HEADS

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        y, conv = self.convolved(x)
        y = replace(y, q=unit(y.q), k=unit(y.k))
        decay, _ = self.decay(x.stream)
        beta = self.beta(x.stream).sigmoid().transpose(1, 2)
        out, state = run(self.spec, y, decay=decay, beta=beta)
        return self.finish(out, x), None if state is None else {**state, **conv}


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| along the channels, in the dtype of x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
