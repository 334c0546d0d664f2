"""hydra: a selective state space that reads both ways (catalogue hydra).

    y_t = [forward scan]_{t-1} + [backward scan]_{t+1} + (W_D x_t + D) v_t
    o_t = norm(y_t) silu(z_t)

Each scan is that of mamba2 (S_t = exp(dt_t A) S_{t-1} + dt_t k_t v_t^T, read by q_t), and its
output moves one token on, so what a token says to itself is left to the diagonal. Attention's q, k
and v serve both directions, with a gain per channel of q for the backward one; steps and rates are
their own. A centred convolution over 7 tokens stands in front.

The start: identity convolution, equal scans with step 1 that keep half of the state over 4,096
tokens, D = 1, gate 1: unnormalised linear attention in both directions. Has to be distilled.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, KV_HEADS, TOKENS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.both_ways import one_late, turned
from rewriter.mixers.shared.gates import SlowDecay, TokenGate
from rewriter.mixers.shared.recurrent import GatedRecurrence, channels, joined, parted
from rewriter.mixers.tokens import Tokens, run


class HydraOptions(MixerOptions):
    """`taps`: of the centred convolution, an odd number; 1 for none."""

    taps: int = Field(default=7, ge=1)


class Hydra(GatedRecurrence):
    info = MixerInfo(
        name="hydra",
        family="ssm",
        tier="distilled",
        summary="two selective state spaces, one from each end, and a free diagonal",
        maths="y = shift(scan(x)) + flip(shift(scan(flip x))) + (W_D x + D) v, o = norm(y) silu(z)",
        source="hydra (Hydra: Bidirectional State Space Models)",
        directions=frozenset({"bidirectional"}),
    )
    Options = HydraOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, HydraOptions)
        self.taps = options.taps
        start = torch.zeros(channels(site), 1, options.taps)
        start[..., options.taps // 2] = 1.0
        self.mixing = nn.Parameter(start)
        self.ahead, self.back = SlowDecay(site, step=1.0), SlowDecay(site, step=1.0)
        self.back_gain = nn.Parameter(torch.ones(site.heads.query, site.heads.key_dim))
        self.diagonal = TokenGate(site.hidden_dim, site.heads.query, 1.0)

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        assert isinstance(options, HydraOptions)
        if options.taps % 2 == 0:
            return f"hydra: a centred convolution needs an odd number of taps, not {options.taps}"
        return super().refuse(site, options)

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        """Of one direction."""
        heads = site.heads
        return Recurrence(heads.key_dim, heads.value_dim, decay="token", scale=site.scale)

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return HEADS * VALUE_DIM + HEADS + 2 * KV_HEADS

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        second = 2 * (HEADS + KV_HEADS) * KEY_DIM * VALUE_DIM
        return super().flops(site, options) + BATCH * TOKENS * second

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        y = self._convolved(x)
        gained = (y.q * self.back_gain.to(y.q.dtype)[:, None]).to(y.q.dtype)
        behind = self._scan(turned(replace(y, q=gained)), self.back).flip(2)
        read = self._scan(y, self.ahead) + behind
        diagonal = self.diagonal(x.stream).transpose(1, 2)[..., None]
        return self.finish(read + x.shown(diagonal * y.own_values()), x), None

    def _convolved(self, x: Tokens) -> Tokens:
        """q, k and v behind the centred convolution; padding counts as 0."""
        if self.taps == 1:
            return x
        rows = joined(x)
        if x.valid is not None:
            rows = rows * x.valid[..., None]
        weight = self.mixing.to(rows.dtype)
        mixed = F.conv1d(rows.mT, weight, padding=self.taps // 2, groups=rows.shape[-1])
        return parted(x, mixed.mT)

    def _scan(self, y: Tokens, rate: SlowDecay) -> Tensor:
        """(B, H, n, Dv) float32: what a token reads of those before it, one token late."""
        decay, step = rate(y.stream)
        read, _ = run(self.spec, replace(y, v=(y.v * step[..., None]).to(y.v.dtype)), decay=decay)
        return one_late(read.float(), y)
