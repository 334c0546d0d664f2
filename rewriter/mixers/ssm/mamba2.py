"""mamba2: a selective state space; attention's q, k, v become its C, B, x (catalogue mamba2).

    S_t = exp(dt_t A_h) S_{t-1} + dt_t B_t x_t^T,   y_t = C_t^T S_t + D_h x_t
    o_t = norm(y_t * silu(W_z x_t + b_z)),          dt_t = softplus(W_dt x_t + b_dt)

with a short convolution over C, B and x. `form='discrete'` is that of MOHAWK: the step leaves the
input alone, exp(dt A) is sigmoid(-W_a x_t - b_a), and there is no norm but a gain.

`start='neutral'` preserves the function that q, k and v had as linear attention: identity
convolution, dt = 1, half of the state left after 4,096 tokens, D = 0, gate 1. `start='published'`
is what the authors train from scratch with: random taps, silu, A from 1 to H, dt log-uniform in
0.001 to 0.1, D = 1. Either has to be distilled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import HEADS, KV_HEADS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.gates import SlowDecay, TokenGate
from rewriter.mixers.shared.norm import HeadNorm
from rewriter.mixers.shared.recurrent import ConvOptions, GatedRecurrence
from rewriter.mixers.tokens import Tokens, run


class Mamba2Options(ConvOptions):
    """`conv`: taps over C, B and x, 1 for none; `activation`: after it; `form`: step size on decay
    and input, or on the decay alone; `start`: near the teacher, or as the authors initialise."""

    form: Literal["continuous", "discrete"] = "continuous"
    start: Literal["neutral", "published"] = "neutral"


class Mamba2(GatedRecurrence):
    info = MixerInfo(
        name="mamba2",
        family="ssm",
        tier="distilled",
        summary="selective state space with convolution, step size, skip and gate; constant state",
        maths="S_t = e^(dt_t A) S_{t-1} + dt_t k_t v_t^T, o_t = norm((q_t S_t + D v_t) silu(z_t))",
        source="mamba2 (Transformers are SSMs); discrete form of MOHAWK",
        directions=frozenset({"causal"}),
    )
    Options = Mamba2Options

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        assert isinstance(options, Mamba2Options)
        super().__init__(site, options, layer)
        self.discrete = options.form == "discrete"
        if self.discrete:
            self.norm = HeadNorm(site, "none")
            self.decay: nn.Module = TokenGate(site.hidden_dim, site.heads.key_value, -6.0)
        else:
            self.decay = SlowDecay(site, step=1.0)
        self.skip = nn.Parameter(torch.zeros(site.heads.query))
        if options.start == "published":
            self._publish()

    def _publish(self) -> None:
        heads = self.site.heads.key_value
        with torch.no_grad():
            self.skip.fill_(1.0)
            if hasattr(self, "conv"):
                self.conv.activation = "silu"
                nn.init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5))
            if isinstance(self.decay, SlowDecay):
                step = torch.logspace(-3, -1, heads)
                self.decay.step.bias.copy_(step + torch.log(-torch.expm1(-step)))
                self.decay.log_rate.copy_(torch.arange(1, heads + 1).log())

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        heads = site.heads
        return Recurrence(heads.key_dim, heads.value_dim, decay="token", scale=site.scale)

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return HEADS * VALUE_DIM + KV_HEADS

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        y, conv = self.convolved(x)
        read, state = self._scan(y)
        skip = x.shown(y.own_values() * self.skip.float()[:, None, None])
        out = (read.float() + skip) * self.gate(x.stream)
        out = self.norm(out).to(x.v.dtype)
        return out, None if state is None else {**state, **conv}

    def _scan(self, y: Tokens) -> tuple[Tensor, State | None]:
        if self.discrete:
            decay = -F.softplus(self.decay(y.stream)).transpose(1, 2)
            return run(self.spec, y, decay=decay)
        decay, step = self.decay(y.stream)
        return run(self.spec, replace(y, v=(y.v * step[..., None]).to(y.v.dtype)), decay=decay)
