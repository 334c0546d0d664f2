"""drop: attention left out (catalogue llm_drop).

o_t = 0, so the block adds nothing to the stream but its output bias. Deep layers of many models
change their input little, and the least important lose almost nothing; the first few are never
among them. Which ones is measured, by the gap that dropping one leaves, never guessed here.
"""

from __future__ import annotations

import sympy
import torch

from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.skip.linear_shortcut import COUNT, counted
from rewriter.mixers.tokens import Tokens


class DropOptions(MixerOptions):
    """No options."""


class Drop(Mixer):
    info = MixerInfo(
        name="drop",
        family="skip",
        tier="approximate",
        summary="attention left out; no state, no cost",
        maths="o_t = 0",
        source="llm_drop (What Matters in Transformers)",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = DropOptions
    averages = False
    reads_keys = False
    silent = True

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return COUNT

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return sympy.Integer(0)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        shape = (*x.q.shape[:3], x.v.shape[-1])
        return x.v.new_zeros(()).expand(shape), counted(x)
