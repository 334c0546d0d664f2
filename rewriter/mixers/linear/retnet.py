"""retnet: linear attention with one constant decay per head (catalogue retnet).

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = silu(W_g x_t) * groupnorm(scale q_t^T S_t)

Head h of the H_kv states starts at the published gamma = 1 - 2^(-5-h), or at a half-life that is
given; it is learned as log(-log gamma), so it stays between 0 and 1. The teacher's rotary
embedding takes the place of the published rotation. The group norm replaces both the normaliser and
the published scores' scaling. Has to be distilled.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import nn

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.recurrent import GatedRecurrence
from rewriter.mixers.tokens import Tokens, run


class RetNetOptions(MixerOptions):
    """`half_life`: tokens after which half is left at the start; None: 1 - 2^(-5-h) by head."""

    half_life: float | None = Field(default=None, gt=0)


class RetNet(GatedRecurrence):
    info = MixerInfo(
        name="retnet",
        family="linear",
        tier="distilled",
        summary="linear attention with a constant decay per head and a group norm; constant state",
        maths="S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = silu(W_g x_t) * groupnorm(q_t S_t)",
        source="retnet (Retentive Network)",
        directions=frozenset({"causal"}),
    )
    Options = RetNetOptions
    norm_kind = "group"

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, RetNetOptions)
        heads = site.heads.key_value
        rates = -torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))
        if options.half_life is not None:
            rates = torch.full((heads,), math.log(2) / options.half_life)
        self.log_rate = nn.Parameter(rates.log())

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        heads = site.heads
        return Recurrence(heads.key_dim, heads.value_dim, decay="head", scale=site.scale)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        out, state = run(self.spec, x, decay=-self.log_rate.float().exp())
        return self.finish(out, x), state
