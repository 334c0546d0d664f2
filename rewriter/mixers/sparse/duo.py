"""duo: some key/value heads keep all keys, the others sinks and a window (catalogue duo).

A few heads of a model do the retrieving; they attend to anything, the rest look at the last tokens
and the first. `full` names the key/value heads that keep the original softmax; every other head
runs the `sink_window` mechanism, and with all heads full, or a window over everything, the layer is
the teacher exactly. Only the keys of full heads grow with the text.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from pydantic import Field

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.kernels import WindowAttention, state_of
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import (
    BATCH,
    HEADS,
    KEY_DIM,
    KV_HEADS,
    VALUE_DIM,
    State,
    StateSpec,
    StateTensor,
)
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.keys import all_keys, key_state, with_score_terms
from rewriter.mixers.shared.pairs import causal_pairs
from rewriter.mixers.shared.refusals import plain_scores
from rewriter.mixers.shared.window import Windowed
from rewriter.mixers.tokens import Tokens, attend, run


class DuoOptions(MixerOptions):
    """`full`: key/value heads that keep every key; `window` and `sinks`: of the other heads."""

    full: tuple[int, ...] = (0,)
    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=64, ge=1)


class Duo(Windowed):
    info = MixerInfo(
        name="duo",
        family="sparse",
        tier="approximate",
        summary="full softmax in chosen key/value heads, window and sinks in the others",
        maths="head in full: softmax over j <= i; else over i - j < window or j < sinks",
        source="duo (DuoAttention)",
        directions=frozenset({"causal"}),
    )
    Options = DuoOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, DuoOptions)
        self.full = sorted(set(options.full))
        self.near = [h for h in range(site.heads.key_value) if h not in self.full]

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> WindowAttention:
        """Of the heads that are not full."""
        assert isinstance(options, DuoOptions)
        return WindowAttention(options.window, options.sinks, True, site.scale, site.softcap)

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        assert isinstance(options, DuoOptions)
        reason = super().refuse(site, options) or plain_scores(cls.info.name, site)
        if reason is not None:
            return reason
        if any(not 0 <= head < site.heads.key_value for head in options.full):
            count = site.heads.key_value
            return f"{cls.info.name}: 'full' names heads beyond the {count} key/value heads"
        return None

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        assert isinstance(options, DuoOptions)
        full = len(set(options.full))
        near = [
            StateTensor(t.name, _heads(t.shape, KV_HEADS - full), t.dtype, t.fill)
            for t in state_of(cls.kernel_spec(site, options)).tensors
        ]
        return StateSpec((*near, *key_state(sympy.Integer(full)).tensors), bounded=full == 0)

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        assert isinstance(options, DuoOptions)
        share = sympy.Integer(len(set(options.full))) / KV_HEADS
        near = causal_pairs(options.window + options.sinks)
        pairs = share * causal_pairs() + (1 - share) * near
        return 2 * BATCH * HEADS * pairs * (KEY_DIM + VALUE_DIM)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        out = x.v.new_zeros(*x.q.shape[:3], x.v.shape[-1])
        state: State = {}
        if self.near:
            part, after = run(self.spec, self._heads(x, self.near))
            out = out.index_copy(1, self._queries(self.near, x), part)
            state |= after or {}
        if self.full:
            part, after = self._attend(self._heads(x, self.full))
            out = out.index_copy(1, self._queries(self.full, x), part)
            state |= after or {}
        if x.state is None:
            return out, None
        return out, {**x.state, **state}

    def _attend(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        """The original softmax of the full heads."""
        keys = all_keys(x)
        q, k = with_score_terms(x.q, keys.k, self.site.scale, None, keys.shown)
        spec = BlockSparse(
            key_dim=q.shape[-1],
            value_dim=keys.v.shape[-1],
            scale=self.site.scale,
            offset=keys.seen,
        )
        out = attend(spec, q, k, keys.v)[0]
        return x.shown(out), keys.state

    def _queries(self, heads: list[int], x: Tokens) -> torch.Tensor:
        """Query heads that read these key/value heads."""
        group = self.site.heads.group
        flat = [h * group + g for h in heads for g in range(group)]
        return torch.tensor(flat, device=x.q.device)

    def _heads(self, x: Tokens, heads: list[int]) -> Tokens:
        at = torch.tensor(heads, device=x.q.device)
        q = x.q.index_select(1, self._queries(heads, x))
        return replace(x, q=q, k=x.k.index_select(1, at), v=x.v.index_select(1, at))


def _heads(shape: tuple[sympy.Expr | int, ...], count: sympy.Expr) -> tuple[sympy.Expr | int, ...]:
    return tuple(count if size is KV_HEADS else size for size in shape)
