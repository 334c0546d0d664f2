"""keep: the exact identity. It replays the captured core with the same torch operations.

o = dropout(softmax(steps(q k^T))) v, or scaled_dot_product_attention as the graph called it. It is
what an unchanged site becomes, and what every re-emission is proved with before another mixer
takes its place.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.nn.functional as F

from rewriter import extension
from rewriter.ir.site import (
    AddTerm,
    AttentionSite,
    FillTerm,
    Scale,
    SinkTerm,
    Softcap,
    TemperatureTerm,
)
from rewriter.ir.state import (
    BATCH,
    HEADS,
    KEY_DIM,
    KV_HEADS,
    TOKENS,
    VALUE_DIM,
    StateSpec,
    StateTensor,
)
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions, Terms


class KeepOptions(MixerOptions):
    """No options."""


class Keep(Mixer):
    info = MixerInfo(
        name="keep",
        family="exact",
        tier="exact",
        summary="the original attention, re-emitted bit for bit",
        maths="o = softmax(q k^T scale + mask) v",
        source="the captured graph",
        directions=frozenset({"causal", "bidirectional"}),
        cross=True,
    )
    Options = KeepOptions
    provides_weights = True

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        """Never: even an opaque mask is replayed as it is."""
        return None

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        """The ordinary key/value cache, which grows with the tokens."""
        return StateSpec(
            (
                StateTensor("keys", (BATCH, KV_HEADS, TOKENS, KEY_DIM)),
                StateTensor("values", (BATCH, KV_HEADS, TOKENS, VALUE_DIM)),
            ),
            bounded=False,
            croppable=True,
        )

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Of all pairs: whether hidden ones are skipped is up to the operator that is replayed."""
        return 2 * BATCH * HEADS * TOKENS**2 * (KEY_DIM + VALUE_DIM)

    @classmethod
    def step_flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return 2 * BATCH * HEADS * TOKENS * (KEY_DIM + VALUE_DIM)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms = (),
        cache: Any = None,
        need_weights: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Mixer.forward`; the state is an ordinary cache layer."""
        seen = 0
        if cache is not None and self.layer is not None:
            seen = int(cache.get_seq_length(self.layer))
            k, v = cache.update(k, v, self.layer)
        return self.attend(q, k, v, terms, seen, need_weights)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms,
        seen: int,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The core behind the cache: q (B, H, new, Dk), all keys and values, `seen` earlier."""
        if self.site.spelling == "sdpa":
            return self._sdpa(q, k, v, terms, seen), None
        out, weights = self._eager(q, k, v, terms, seen)
        return out, weights if need_weights else None

    def _eager(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.site.heads.group
        k, v = _repeat(k, group), _repeat(v, group)
        for step in self.site.score:
            if isinstance(step, Scale) and step.on == "query":
                q = _scaled(q, step)
            elif isinstance(step, Scale) and step.on == "key":
                k = _scaled(k, step)
        scores = torch.matmul(q, k.transpose(-1, -2))
        sink: torch.Tensor | None = None
        for step in self.site.score:
            if isinstance(step, Scale) and step.on == "scores":
                scores = _scaled(scores, step)
            elif isinstance(step, Softcap):
                scores = torch.tanh(scores / step.cap) * step.cap
            elif isinstance(step, AddTerm):
                term = _columns(terms[step.index], k.shape[-2])
                if term is not None:
                    scores = torch.add(scores, term, alpha=step.factor)
            elif isinstance(step, FillTerm):
                term = _columns(terms[step.index], k.shape[-2])
                if term is not None:
                    chosen = ~term.bool() if step.keep else term.bool()
                    scores = scores.masked_fill(chosen, step.value)
            elif isinstance(step, TemperatureTerm):
                factor = terms[step.index]
                if factor is not None:
                    scores = scores / factor if step.divide else scores * factor
            elif isinstance(step, SinkTerm):
                sink = terms[step.index]
        if self.site.causal_flag:
            hidden = ~self._visible(q.shape[-2], k.shape[-2], seen, q.device)
            scores = scores.masked_fill(hidden, -torch.inf)
        name = self.site.softmax_dtype
        dtype = None if name is None else getattr(torch, name)
        if self.site.normaliser != "softmax":
            cast = scores if dtype is None else scores.to(dtype)
            weights = extension.anchor(self.site.normaliser).apply(cast).to(v.dtype)
        elif sink is None:
            weights = torch.softmax(scores, dim=-1, dtype=dtype).to(v.dtype)
        else:
            weights = _with_sink(scores, sink, dtype).to(v.dtype)
        weights = F.dropout(weights, p=self.site.dropout, training=self.training)
        return torch.matmul(weights, v), weights

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms, seen: int
    ) -> torch.Tensor:
        new, group = q.shape[-2], self.site.heads.group
        mask = _columns(next((t for t in terms if t is not None), None), k.shape[-2])
        causal = False
        # Without a tensor a causal site means the flag, also where the traced call had a mask.
        if mask is None and self.site.kind == "causal":
            if seen == 0 and k.shape[-2] > new:  # an empty static cache shows its whole length
                k, v = k[:, :, :new], v[:, :, :new]
            causal, mask = self._flag_or_mask(new, k.shape[-2], seen, q.device)
        heads = q.shape[1]
        grouped = group > 1 and mask is None
        packed = group > 1 and mask is not None and new == 1 and mask.shape[1] in (1, heads)
        if packed and mask is not None:
            # One token: the group's heads are rows of one head, so K and V are not copied.
            q = q.reshape(q.shape[0], -1, group, q.shape[-1])
            mask = (
                mask
                if mask.shape[1] == 1
                else mask.reshape(mask.shape[0], -1, group, mask.shape[-1])
            )
        elif group > 1 and not grouped:
            k, v = _repeat(k, group), _repeat(v, group)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.site.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.site.scale,
            enable_gqa=grouped,
        )
        return out.reshape(out.shape[0], heads, new, -1) if packed else out

    def _visible(self, new: int, keys: int, seen: int, device: torch.device) -> torch.Tensor:
        """(1, 1, new, keys) bool from the site's predicate; a sliding cache shows the last keys."""
        first = max(0, seen + new - keys)
        queries = torch.arange(seen, seen + new, device=device)
        return self.site.mask.dense(queries, torch.arange(first, first + keys, device=device))[
            None, None
        ]

    def _flag_or_mask(
        self, new: int, keys: int, seen: int, device: torch.device
    ) -> tuple[bool, torch.Tensor | None]:
        """The causal flag where it means the site's mask, nothing where all is visible, or a mask.

        The flag aligns the first query with the first key, so it is wrong behind a cache.
        """
        window = self.site.mask.window
        if window is None or keys <= window:
            if keys == new:
                return new > 1, None
            if new == 1 and keys <= seen + 1:
                return False, None
        return False, self._visible(new, keys, seen, device)


def _scaled(x: torch.Tensor, step: Scale) -> torch.Tensor:
    return x / step.value if step.divide else x * step.value


def _with_sink(scores: torch.Tensor, sink: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Softmax over the keys and one more logit per head, (B|1, H|1, n|1, 1), that is dropped.

    The maximum is taken away before the softmax, as those models do it in half precision.
    """
    logits = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    logits = logits - logits.amax(-1, keepdim=True)
    return torch.softmax(logits, dim=-1, dtype=dtype)[..., :-1]


def _columns(term: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """The columns of the keys at hand; a mask may have been made for a longer cache."""
    return term if term is None or term.shape[-1] <= keys else term[..., :keys]


def _repeat(x: torch.Tensor, group: int) -> torch.Tensor:
    """(B, Hkv, N, D) to (B, Hkv * group, N, D), each head `group` times in a row."""
    if group == 1:
        return x
    B, heads, n, width = x.shape
    return x.unsqueeze(2).expand(B, heads, group, n, width).reshape(B, heads * group, n, width)
