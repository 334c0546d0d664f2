"""hedgehog: linear attention with a learned feature map that mimics softmax (catalogue hedgehog).

o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), over j <= i or over all keys. The map
sees q and k after rotary embedding, so the student starts from the teacher's own logits, and the
scale is shared by q and k. Each query head and each key/value head has its own W; the state is one
per key/value head. Untrained it mixes almost uniformly: it has to be distilled.

A softcap of the teacher has no form here; the map learns the capped weights.
"""

from __future__ import annotations

import sympy
import torch
from pydantic import Field

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, KV_HEADS, TOKENS, VALUE_DIM, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.linear.features import map_pair
from rewriter.mixers.shared.refusals import sees_everything
from rewriter.mixers.tokens import Tokens, run


class HedgehogOptions(MixerOptions):
    """`feature_dim`: columns of W, the map has twice as many features; None: the head's width."""

    feature_dim: int | None = Field(default=None, ge=1)


class Hedgehog(Mixer):
    info = MixerInfo(
        name="hedgehog",
        family="linear",
        tier="distilled",
        summary="linear attention with a learned softmax-like map; constant state",
        maths="o_i = phi(q_i) S_i / phi(q_i) z_i, phi(x) = [softmax(xW); softmax(-xW)]",
        source="hedgehog (The Hedgehog & the Porcupine), softmax form",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = HedgehogOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.spec = self.kernel_spec(site, options)
        self.map_q, self.map_k = map_pair(site, feature_dim(site, options))

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or refuse_map(cls.info.name, site, options)

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        return Recurrence(
            key_dim=2 * feature_dim(site, options),
            value_dim=site.heads.value_dim,
            normaliser="ones",
            causal=site.kind == "causal",
        )

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return cls.kernel_spec(site, options).state_spec()

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        width = feature_dim(site, options)
        maps = 2 * BATCH * (HEADS + KV_HEADS) * TOKENS * KEY_DIM * width
        return maps + 4 * BATCH * HEADS * TOKENS * 2 * width * (VALUE_DIM + 1)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        return run(self.spec, x, self.map_q(x.q), self.map_k(x.k), x.v)

    def attention_rows(self, x: Tokens, queries: slice) -> torch.Tensor:
        keys = self.map_k(x.k).repeat_interleave(self.site.heads.group, 1)
        weight: torch.Tensor = self.map_q(x.q[:, :, queries]) @ keys.transpose(-1, -2)
        if self.site.kind == "causal":
            weight = weight.tril(queries.start)
        if x.valid is not None:
            both = x.valid[:, None, queries, None] & x.valid[:, None, None, :]
            weight = weight.masked_fill(~both, 0.0)
        mass = weight.sum(-1, keepdim=True)
        return weight / torch.where(mass > 0, mass, 1.0)


def feature_dim(site: AttentionSite, options: MixerOptions) -> int:
    """Columns of W."""
    chosen: int | None = getattr(options, "feature_dim", None)
    return site.heads.key_dim if chosen is None else chosen


def refuse_map(name: str, site: AttentionSite, options: MixerOptions) -> str | None:
    """Why a learned map over all earlier keys cannot serve the site, or None."""
    if feature_dim(site, options) > site.heads.key_dim:
        return f"feature_dim is larger than the head's width, {site.heads.key_dim}"
    return sees_everything(name, site)
