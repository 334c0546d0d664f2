"""moba: every query chooses the blocks of keys it attends to (catalogue moba).

Keys lie in blocks of c tokens. A query scores each past block by its product with the mean of the
block's keys, and attends by the original softmax to the best blocks, its own among them, causally.
No parameters: it works untrained, and trains as it is, since the choice passes no gradient. With
as many blocks as there are, it is the teacher exactly.

The choice is made per token and query head. Blocks that no query of a block of queries wants are
left out through the kernel's run-time lists; inside the others the choice is a term of the score,
one channel of q and k for each block, so it costs width: c should grow with the text. Blocks are
counted from the first real token, so padding in front changes nothing.
"""

from __future__ import annotations

import sympy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, TOKENS, VALUE_DIM, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.shared.keys import Keys, all_keys, key_state, with_score_terms
from rewriter.mixers.shared.refusals import plain_scores
from rewriter.mixers.tokens import Tokens, attend


class MobaOptions(MixerOptions):
    """`block`: tokens in a block; `blocks`: how many a query reads, its own included."""

    block: int = Field(default=128, ge=1)
    blocks: int = Field(default=4, ge=1)


class Moba(Mixer):
    info = MixerInfo(
        name="moba",
        family="sparse",
        tier="approximate",
        summary="softmax over the blocks of keys whose means a query likes best, and its own",
        maths="o_i = softmax over blocks top_t(q_i . mean k_b) and own of (q_i k_j scale) v_j",
        source="moba (Mixture of Block Attention)",
        directions=frozenset({"causal"}),
    )
    Options = MobaOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, MobaOptions)
        self.block, self.blocks = options.block, options.blocks

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or plain_scores(cls.info.name, site)

    @classmethod
    def limit_options(cls, options: MixerOptions, tokens: int) -> MixerOptions | None:
        return options.model_copy(update={"blocks": tokens})

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return key_state()

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Chosen pairs and the scores of the means."""
        assert isinstance(options, MobaOptions)
        keys = sympy.Min(TOKENS / 2, options.block * options.blocks)
        chosen = 2 * BATCH * HEADS * TOKENS * keys * (KEY_DIM + VALUE_DIM)
        return chosen + 2 * BATCH * HEADS * TOKENS * KEY_DIM * TOKENS / options.block

    def test_length(self) -> int:
        return min(self.block * (self.blocks + 2) + 3, 1024)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        keys, scale = all_keys(x), self.site.scale
        part = self._parts(keys)
        chosen = self._choose(x.q.detach(), keys, part)
        q, k = with_score_terms(x.q, keys.k, scale, None, keys.shown, (~chosen, part))
        listed = keys.seen == 0 and keys.shown is None and x.count > self.block
        spec = BlockSparse(
            key_dim=q.shape[-1],
            value_dim=keys.v.shape[-1],
            scale=scale,
            offset=keys.seen,
            block=self.block if listed else 0,
        )
        given = {"blocks": self._lists(chosen)} if listed else {}
        out = attend(spec, q, k, keys.v, **given)[0]
        return x.shown(out), keys.state

    def _parts(self, keys: Keys) -> Tensor:
        """(B, N) int64: the block of each key, counted over real tokens."""
        batch, _, n, _ = keys.k.shape
        if keys.shown is None:
            return (torch.arange(n, device=keys.k.device) // self.block).expand(batch, -1)
        return (keys.shown.long().cumsum(1) - 1).clamp_min(0) // self.block

    def _choose(self, q: Tensor, keys: Keys, part: Tensor) -> Tensor:
        """(B, H, n, P) bool: the blocks that each query reads."""
        count = -(-keys.k.shape[2] // self.block)
        member = F.one_hot(part, count).float()
        if keys.shown is not None:
            member = member * keys.shown[..., None]
        size = member.sum(1).clamp_min(1.0)
        means = member.mT[:, None] @ keys.k.detach().float() / size[:, None, :, None]
        means = means.repeat_interleave(self.site.heads.group, 1)
        own = part[:, None, keys.seen :, None]
        number = torch.arange(count, device=q.device)
        scores = (q.float() @ means.mT).masked_fill(number >= own, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices  # of equals the earlier
        best = order[..., : self.blocks - 1]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return (chosen & (number < own)) | (number == own)

    def _lists(self, chosen: Tensor) -> Tensor:
        """(B, Hkv, query blocks, P) int32: what any query of a block and a head group reads."""
        batch, heads, n, count = chosen.shape
        group, rows = self.site.heads.group, -(-n // self.block)
        wide = F.pad(chosen, (0, 0, 0, rows * self.block - n))
        wide = wide.view(batch, heads // group, group, rows, self.block, count).any(4).any(2)
        number = torch.arange(count, device=chosen.device).expand_as(wide)
        listed = number.masked_fill(~wide, count).sort(-1).values
        return listed.masked_fill(listed == count, -1).int()
