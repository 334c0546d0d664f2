"""sigmoid_attention: sigmoid weights in the place of softmax (catalogue sigmoid_attn).

    o_i = g sum_j sigmoid(scale q_i.k_j + b_i) v_j,   b_i = c_h - ln(keys that i sees)

No maximum and no sum: a row is not normalised, so one key does not change the weight of another.
With `bias='row'` the bias follows the number of visible keys, and for small logits the weights are
e^s / n, softmax to first order; 'constant' is the published -ln N for the longest text. c_h (0 at
the start) and the gain g per channel (1) are learned; `fit` sets the gain. The bias enters as a
channel of q and k, so the kernel reads no table. A softcap would cap the bias with the scores, so
it is refused. All keys are kept, as in the original.
"""

from __future__ import annotations

import math
from typing import Literal

import sympy
import torch
from pydantic import Field
from torch import nn

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, TOKENS, VALUE_DIM, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.shared.keys import Keys, all_keys, key_state, with_score_terms
from rewriter.mixers.shared.norm import HeadNorm
from rewriter.mixers.shared.refusals import plain_scores
from rewriter.mixers.tokens import Tokens, attend


class SigmoidOptions(MixerOptions):
    """`bias`: -ln of the keys that a query sees, or of `length`; `length`: N of 'constant'."""

    bias: Literal["row", "constant"] = "row"
    length: int = Field(default=4096, ge=1)


class SigmoidAttention(Mixer):
    info = MixerInfo(
        name="sigmoid_attention",
        family="sparse",
        tier="distilled",
        summary="sigmoid weights without a normaliser, over all keys",
        maths="o_i = g sum_j sigmoid(scale q_i k_j + c_h - ln n_i) v_j",
        source="sigmoid_attn (Theory, Analysis and Best Practices for Sigmoid Self-Attention)",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = SigmoidOptions
    averages = False

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, SigmoidOptions)
        self.constant = -math.log(options.length) if options.bias == "constant" else None
        self.shift = nn.Parameter(torch.zeros(site.heads.query))
        self.norm = HeadNorm(site, "none")

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or plain_scores(cls.info.name, site)

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return key_state()

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        keys = TOKENS / 2 if site.kind == "causal" else TOKENS
        return 2 * BATCH * HEADS * TOKENS * keys * (KEY_DIM + VALUE_DIM)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        keys, scale = all_keys(x), self.site.scale
        row = self.shift.float()[:, None] + self._bias(x, keys)
        q, k = with_score_terms(x.q, keys.k, scale, row, keys.shown)
        causal = self.site.kind == "causal"
        spec = BlockSparse(
            key_dim=q.shape[-1],
            value_dim=keys.v.shape[-1],
            scale=scale,
            mask=self.site.mask.without_padding().predicate,
            weight="sigmoid",
            offset=keys.seen if causal else 0,
        )
        out = x.shown(self.norm(attend(spec, q, k, keys.v)[0]))
        return out.to(x.v.dtype), keys.state

    def _bias(self, x: Tokens, keys: Keys) -> torch.Tensor:
        """(B | 1, 1, n) float32: minus the logarithm of a count of keys."""
        if self.constant is not None:
            return torch.full((1, 1, 1), self.constant, device=x.q.device)
        if keys.shown is None:
            count = torch.arange(1, keys.k.shape[2] + 1, device=x.q.device)[None]
        else:
            count = keys.shown.long().cumsum(1)
        if self.site.kind == "bidirectional":
            count = count[:, -1:]
        return -count[:, None, -x.count :].clamp_min(1).float().log()

    def fit(self, x: Tokens, target: torch.Tensor) -> None:
        """Set the gain of every head."""
        with torch.no_grad():
            self.norm.fit(self.mix(x)[0], target)
