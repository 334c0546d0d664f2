"""hedgehog_window: sinks and a sliding window in softmax, all older keys linear, one normaliser.

    o_i = (sum_near e^(s_ij - m_i) v_j + r_h phi(q_i) S_i) / (the same with 1 for v_j)

with near = window and sinks, S_i = sum of phi(k_j) v_j^T over the older keys, m_i the largest near
logit, phi the Hedgehog map and r_h = exp(c_h) learned per head (catalogue lolcats_hybrid in its
sliding form, with the sinks kept exact). A key enters S when it leaves the window, so a token step
equals the full forward. With window >= length it is the teacher exactly, whatever r_h is.

The start. Untrained features are nearly uniform: phi(q).phi(k) is about 2 / feature_dim for every
pair, so the far mass is r_h 2 N / feature_dim against a near mass of at least 1. On random q, k, v
of width 64, window 64 and 1,024 tokens the output moves from the window alone by 0.5 to 3 % at
c = -6, by 4 to 19 % at -4 and by 54 to 84 % at 0. Where attention is local, c above -5 made the
untrained student worse than its window; where it is diffuse, larger c was better. -6 is the
default, since a converted model should not start below its window; the gradient of c_h is
proportional to the far mass, so give c_h a larger learning rate or a higher start to train faster.

With `bits` phi is a learned soft hash into 2^bits cells instead (`HashMap`), for heads that look
back at single tokens. Its far mass starts near r_h N / 2^bits, so c = 2 suits it. A soft bit agrees
less often than a sharp one, and a map that may not raise its mass by r_h learns to agree with more
keys instead: so c_h learns faster than the map there. A cell is a float32 value of the head and
its normaliser: the bytes of one token of a bfloat16 cache of keys and values, so 12 bits take the
memory of 4,096 tokens, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from pydantic import Field, model_validator
from torch import nn

from rewriter.ir.kernels import JointWindowLinear
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, KV_HEADS, TOKENS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.linear.features import (
    HashMap,
    HedgehogMap,
    hash_factors,
    hash_pair,
    map_pair,
)
from rewriter.mixers.linear.hashing import fit_hash
from rewriter.mixers.linear.hedgehog import feature_dim, refuse_map
from rewriter.mixers.shared.pairs import causal_pairs
from rewriter.mixers.shared.window import Windowed
from rewriter.mixers.tokens import Tokens, run

FIT_ROWS = 128
"""Queries whose weights are held at once while a hash is fitted."""


class HedgehogWindowOptions(MixerOptions):
    """Options.

    `window`: tokens in the window, the query's own included; `sinks`: first tokens kept exact;
    `feature_dim`: columns of W, None for the head's width; `initial_log_ratio`: c_h at the start;
    `bits`: of the soft hash that takes the place of the Hedgehog map, None for the map;
    `sharpness`: standard deviation of the hash's directions at the start.
    """

    window: int = Field(default=64, ge=1)
    sinks: int = Field(default=4, ge=0)
    feature_dim: int | None = Field(default=None, ge=1)
    initial_log_ratio: float = Field(default=-6.0, ge=-30.0, le=10.0)
    bits: int | None = Field(default=None, ge=2, le=16)
    sharpness: float = Field(default=0.7, gt=0.0, le=100.0)

    @model_validator(mode="after")
    def _one_map(self) -> HedgehogWindowOptions:
        if self.bits is not None and self.feature_dim is not None:
            raise ValueError("give 'feature_dim' or 'bits': one map has no room for both")
        return self


def far_features(site: AttentionSite, options: HedgehogWindowOptions) -> int:
    """Width of phi."""
    return 2 * feature_dim(site, options) if options.bits is None else 2**options.bits


class HedgehogWindow(Windowed):
    info = MixerInfo(
        name="hedgehog_window",
        family="hybrid",
        tier="distilled",
        summary="softmax over window and sinks, linear attention over older keys, one normaliser",
        maths="o = (sum_near e^(s-m) v + r phi(q) S) / (sum_near e^(s-m) + r phi(q) z)",
        source="lolcats_hybrid (LoLCATs), sliding form with sinks",
        directions=frozenset({"causal"}),
    )
    Options = HedgehogWindowOptions
    branches = ("window", "linear")

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, HedgehogWindowOptions)
        self.map_q: HedgehogMap | HashMap
        self.map_k: HedgehogMap | HashMap
        if options.bits is None:
            self.map_q, self.map_k = map_pair(site, feature_dim(site, options))
        else:
            self.map_q, self.map_k = hash_pair(site, options.bits, options.sharpness)
            self.rates = {"log_ratio": 6.0}
        start = torch.full((site.heads.query,), options.initial_log_ratio)
        self.log_ratio = nn.Parameter(start)

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or refuse_map(cls.info.name, site, options)

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> JointWindowLinear:
        assert isinstance(options, HedgehogWindowOptions)
        return JointWindowLinear(
            window=options.window,
            sinks=options.sinks,
            scale=site.scale,
            features=far_features(site, options),
            softcap=site.softcap,
            factors=() if options.bits is None else hash_factors(options.bits),
        )

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        assert isinstance(options, HedgehogWindowOptions)
        features = far_features(site, options)
        columns = feature_dim(site, options) if options.bits is None else options.bits
        pairs = causal_pairs(options.window + options.sinks)
        near = 2 * BATCH * HEADS * pairs * (KEY_DIM + VALUE_DIM)
        maps = 2 * BATCH * (HEADS + KV_HEADS) * TOKENS * KEY_DIM * columns
        return near + maps + 4 * BATCH * HEADS * TOKENS * features * (VALUE_DIM + 1)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        ratio = self.log_ratio.float().exp()
        return run(self.active(), x, x.q, x.k, x.v, self.map_q(x.q), self.map_k, ratio)

    @property
    def takes_data(self) -> bool:
        return isinstance(self.map_q, HashMap) and isinstance(self.map_k, HashMap)

    def fit(self, x: Tokens, target: torch.Tensor) -> None:
        """Start the bits of a soft hash where queries and the far keys they attend to agree."""
        if isinstance(self.map_q, HashMap) and isinstance(self.map_k, HashMap):
            fit_hash(self.map_q, self.map_k, x.q, x.k, self._far_attention(x))

    def _far_attention(self, x: Tokens) -> Iterator[tuple[slice, torch.Tensor]]:
        """Softmax over all keys, 0 at the near ones, for blocks of queries."""
        for start in range(0, x.count, FIT_ROWS):
            queries = slice(start, min(start + FIT_ROWS, x.count))
            logits, seen, close = self._scores(x, queries)
            weight = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
            if x.valid is not None:
                weight = weight * x.valid[:, None, queries, None]
            yield queries, weight.masked_fill(close, 0.0)

    def _scores(self, x: Tokens, queries: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (B, H, rows, n) float32, and masks of the keys that are seen and that are near."""
        assert isinstance(self.options, HedgehogWindowOptions)
        q, k, valid = x.q[:, :, queries], x.k, x.valid
        if valid is None:
            valid = torch.ones(x.batch, x.count, dtype=torch.bool, device=k.device)
        at = torch.arange(x.count, device=k.device)
        distance = at[queries, None] - at
        sink = valid & (valid.long().cumsum(-1) <= self.options.sinks)
        seen = (valid[:, None, :] & (distance >= 0))[:, None]
        close = seen & ((distance < self.options.window) | sink[:, None, None, :])
        keys = k.float().repeat_interleave(self.site.heads.group, 1)
        logits = q.float() @ keys.transpose(-1, -2) * self.site.scale
        if self.site.softcap is not None:
            logits = self.site.softcap * torch.tanh(logits / self.site.softcap)
        return logits, seen, close

    def attention_rows(self, x: Tokens, queries: slice) -> torch.Tensor:
        logits, seen, close = self._scores(x, queries)
        logits = logits.masked_fill(~close, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        near = (logits - torch.where(top == -torch.inf, 0.0, top)).exp()
        keys = self.map_k(x.k).repeat_interleave(self.site.heads.group, 1)
        rows = self.map_q(x.q[:, :, queries])
        assert isinstance(self.options, HedgehogWindowOptions)
        bits = self.options.bits
        widths = [rows.shape[-1]] if bits is None else [*hash_factors(bits)]
        far = self.log_ratio.float().exp()[None, :, None, None]
        for r, c in zip(torch.split(rows, widths, -1), torch.split(keys, widths, -1), strict=True):
            far = far * (r @ c.transpose(-1, -2))
        far = far.masked_fill(~(seen & ~close), 0.0)
        weight = far if "window" in self.disabled else near
        if not self.disabled:
            weight = near + far
        if x.valid is not None:
            weight = weight * x.valid[:, None, queries, None]
        mass = weight.sum(-1, keepdim=True)
        return weight / torch.where(mass > 0, mass, 1.0)
