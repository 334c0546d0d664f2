"""rwkv7: decay per channel, a correction whose vectors are not tied to the key (catalogue rwkv7).

    S_t = Diag(w_t) S_{t-1} - (c_t * a_t) (c_t^T S_{t-1}) + k_t v_t^T
    o_t = g_t * (groupnorm(q_t^T S_t) + (q_t . (r * k_t)) v_t)

    log w = -0.6065 sigmoid(w0 + tanh(x W1) W2), a = sigmoid(a0 + x A1 A2), c = unit(k * k_k),
    k <- k (1 + (a - 1) k_a), and every reader sees x mixed with the token before it by its own mu.

q and v keep their teacher's projections; their token shift acts behind the projection. The first
layer's values are not mixed into later layers, since every layer is rewritten by itself. The decay
cannot fall below 0.545 a token, so a chunk of 64 tokens stays within fp32.

The start: no shift, w = 0.9998, a = 0.018 (little is erased), k_a = r = 0, g = 1. Distil it.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from pydantic import Field
from torch import nn

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import HIDDEN, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.linear.gated_deltanet import unit
from rewriter.mixers.shared.gates import TokenGate, per_head
from rewriter.mixers.shared.norm import HeadNorm
from rewriter.mixers.shared.recurrent import QKV, GatedRecurrence, channels, joined, parted
from rewriter.mixers.shared.shift import TokenShift, carried
from rewriter.mixers.tokens import Tokens, run

FASTEST = -0.606531  # the log decay lies between this and 0


class Rwkv7Options(MixerOptions):
    """`rank`: of the maps behind w, a and g."""

    rank: int = Field(default=32, ge=1)


class Rwkv7(GatedRecurrence):
    info = MixerInfo(
        name="rwkv7",
        family="linear",
        tier="distilled",
        summary="decay per channel, learned low-rank correction, token shift; constant state",
        maths="S_t = Diag(w_t) S_{t-1} - (c a)_t c_t S_{t-1} + k_t v_t^T, o_t = g_t norm(q_t S_t)",
        source="rwkv7 (RWKV-7 Goose)",
        directions=frozenset({"causal"}),
    )
    Options = Rwkv7Options

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        Mixer.__init__(self, site, options, layer)
        assert isinstance(options, Rwkv7Options)
        heads, rank = site.heads, options.rank
        self.spec = self.kernel_spec(site, options)
        keys = heads.key_value * heads.key_dim
        width = site.hidden_dim
        self.forget = TokenGate(width, keys, -8.0, rank, "tanh")
        self.erase = TokenGate(width, keys, -4.0, rank)
        self.open = TokenGate(width, heads.query * heads.value_dim, 1.0, rank, "sigmoid")
        self.stream_shift = TokenShift(width, 3)
        self.shift = TokenShift(channels(site), 1)
        self.norm = HeadNorm(site, "group", eps=heads.value_dim * 1e-5)
        self.key_scale = nn.Parameter(torch.ones(heads.key_value, heads.key_dim))
        self.key_blend = nn.Parameter(torch.zeros(heads.key_value, heads.key_dim))
        self.bonus = nn.Parameter(torch.zeros(heads.query, heads.key_dim))

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        heads = site.heads
        return Recurrence(
            heads.key_dim, heads.value_dim, decay="channel", correction="untied", scale=site.scale
        )

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        state = cls.kernel_spec(site, options).state_spec()
        shifted = (carried("stream", 1, HIDDEN), carried("rows", 1, QKV))
        return StateSpec((*state.tensors, *shifted))

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        assert isinstance(options, Rwkv7Options)
        return sympy.Integer(6 * options.rank)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        state, kv, group = x.state or {}, self.site.heads.key_value, self.site.heads.group
        (for_w, for_a, for_g), stream = self.stream_shift(x.stream, x.valid, state.get("stream"))
        (mixed,), rows = self.shift(joined(x), x.valid, state.get("rows"))
        y = parted(x, mixed)
        decay = per_head(FASTEST * self.forget(for_w).sigmoid(), kv)
        rate = per_head(self.erase(for_a).sigmoid(), kv)
        removed = unit(y.k.float() * self.key_scale.float()[:, None], 1e-12)
        k = y.k.float() * (1 + (rate - 1) * self.key_blend.float()[:, None])
        y = replace(y, k=k.to(y.k.dtype))
        read, after = run(self.spec, y, decay=decay, erase=-removed, add=removed * rate)
        direct = y.q.float() * self.bonus.float()[:, None] * k.repeat_interleave(group, 1)
        direct = self.site.scale * direct.sum(-1, keepdim=True)
        out = x.shown(self.norm(read) + direct * y.own_values())
        out = (out * per_head(self.open(for_g), self.site.heads.query)).to(x.v.dtype)
        return out, None if after is None else {**after, "stream": stream, "rows": rows}
