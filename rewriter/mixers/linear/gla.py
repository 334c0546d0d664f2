"""gla: linear attention whose state forgets channel by channel (catalogue gla).

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   a_t = sigmoid(W2 W1 x_t + b)^(1/tau)
    o_t = silu(W_g x_t) * norm(scale q_t^T S_t)

One gate vector for each key/value head, shared by the query heads that read it. The start is
neutral: W2 = 0 and b = 6 keep half of the state for 4,500 tokens (b = 0, as a fresh gate would
have, keeps half for 16), the output gate is 1, and queries and keys stay rotated as the teacher
has them. Has to be distilled.
"""

from __future__ import annotations

import sympy
import torch
import torch.nn.functional as F
from pydantic import Field

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import HEADS, KEY_DIM, KV_HEADS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.gates import TokenGate, per_head
from rewriter.mixers.shared.recurrent import GatedRecurrence
from rewriter.mixers.tokens import Tokens, run


class GlaOptions(MixerOptions):
    """`rank`: rows of W1; `temperature`: tau; `start`: b at the beginning."""

    rank: int = Field(default=16, ge=1)
    temperature: float = Field(default=16.0, gt=0)
    start: float = 6.0


class Gla(GatedRecurrence):
    info = MixerInfo(
        name="gla",
        family="linear",
        tier="distilled",
        summary="linear attention with a learned decay for every key channel; constant state",
        maths="S_t = Diag(a_t) S_{t-1} + k_t v_t^T, o_t = silu(W_g x_t) * norm(q_t S_t)",
        source="gla (Gated Linear Attention)",
        directions=frozenset({"causal"}),
    )
    Options = GlaOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, GlaOptions)
        channels = site.heads.key_value * site.heads.key_dim
        self.forget = TokenGate(site.hidden_dim, channels, options.start, options.rank)
        self.temperature = options.temperature

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        heads = site.heads
        return Recurrence(heads.key_dim, heads.value_dim, decay="channel", scale=site.scale)

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        assert isinstance(options, GlaOptions)
        return HEADS * VALUE_DIM + options.rank + sympy.Min(options.rank, KV_HEADS * KEY_DIM)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        decay = F.logsigmoid(self.forget(x.stream)) / self.temperature
        out, state = run(self.spec, x, decay=per_head(decay, self.site.heads.key_value))
        return self.finish(out, x), state
