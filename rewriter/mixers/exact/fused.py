"""fused: the original attention on generated kernels, key blocks that its mask hides left out.

The same function as `keep`, with sums in another order: o = softmax(q k^T scale + mask) v, dense or
sparse as the site's own mask says, K and V read once per group of query heads. Biases (ALiBi,
relative, of windows), learned sinks and a second sequence enter as they are. Nothing is learned
and nothing is approximated. A call that the kernels cannot serve exactly (left padding, a custom
mask, dropout in training, another device) runs as the graph had it. Attention weights that the
graph hands on are computed if somebody reads them (`deferred`); with gradients, while a graph is
made, or behind a cache, such a call runs as the graph had it.
"""

from __future__ import annotations

import itertools
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch

from rewriter.backends.ops.eager import unwatched
from rewriter.backends.registry import Kernel, resolve
from rewriter.errors import UnsupportedError
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.given import boundaries
from rewriter.ir.mask import (
    Causal,
    Dilated,
    Documents,
    KeyPadding,
    Mask,
    SymmetricWindow,
    Window,
    WindowOrStride,
)
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, TOKENS, VALUE_DIM
from rewriter.kv_cache import in_place
from rewriter.mixers import terms as site_terms
from rewriter.mixers.base import MixerInfo, MixerOptions, Terms
from rewriter.mixers.exact import packing, reading
from rewriter.mixers.exact.deferred import DeferredTensor
from rewriter.mixers.exact.keep import Keep, KeepOptions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Masks that mean the same when queries and keys move by the same distance.
_RELATIVE = (Causal, Window, SymmetricWindow, Dilated, WindowOrStride, KeyPadding)
_MOST_PIECES = 16  # of a row with groups: each piece is a call of its own


class FusedOptions(KeepOptions):
    """No options."""


class Fused(Keep):
    info = MixerInfo(
        name="fused",
        family="exact",
        tier="exact",
        summary="the original attention on generated kernels; hidden key blocks are skipped",
        maths="o = softmax(q k^T scale + mask) v",
        source="flash attention over a block schedule (catalogue: sparse.md K1, K4)",
        directions=frozenset({"causal", "bidirectional"}),
        cross=True,
    )
    Options = FusedOptions

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        if site.mask.opaque is not None:
            return f"the mask is opaque ({site.mask.opaque})"
        if site.cross and site.mask.without_padding().atoms:
            return "fused has no form for cross attention under a mask other than padding"
        if site.temperature is not None and site.softcap is not None:
            return "fused has no form for a learned temperature beside a soft-cap"
        if site.normaliser != "softmax":
            return f"fused computes a softmax, and this block a {site.normaliser}"
        return None

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Of the pairs that the mask shows."""
        size = site.mask.window or (2 * site.mask.radius + 1 if site.mask.radius else None)
        share = TOKENS / 2 if site.mask.causal else TOKENS
        keys = share if size is None else sympy.Min(share, size)
        return 2 * BATCH * HEADS * TOKENS * keys * (KEY_DIM + VALUE_DIM)

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
        """As `Keep.forward`; the cache is written in place from here on."""
        own, seen = (k, v), 0
        if cache is not None and self.layer is not None:
            in_place(cache, self.layer)
            seen = int(cache.get_seq_length(self.layer))
            k, v = cache.update(k, v, self.layer)
        return self.attend(q, k, v, terms, seen, need_weights, own)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms,
        seen: int,
        need_weights: bool,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Keep.attend`; `own` are the new keys and values, which no cache will change."""
        cu_seqlens = None if torch.compiler.is_compiling() else packing.ends()
        if cu_seqlens is not None:
            return self._packed(q, k, v, terms, need_weights, cu_seqlens), None
        out = None
        cached = own is not None and own[0] is not k
        # More keys than tokens without a cache are a memory beside them, unless it is a sequence.
        beside = not (cached or self.site.cross) and k.shape[-2] > q.shape[-2] + seen
        plain = not (self.training and self.site.dropout) and v.dtype in _DTYPES and not beside
        if plain and (not need_weights or _can_wait(q, k, v, seen, self.site.cross)):
            out = self._generated(q, k, v, terms, seen)
        if out is None:
            return super().attend(q, k, v, terms, seen, need_weights)
        return out, self._deferred(q, *(own or (k, v)), terms) if need_weights else None

    def _deferred(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        """The attention weights (B, H, N, N), computed when they are read."""

        def compute() -> torch.Tensor:
            weights = Keep.attend(self, q, k, v, terms, 0, True)[1]
            assert weights is not None
            return weights

        sources = [x for x in (q, k, v, *terms) if x is not None]
        return DeferredTensor.of(compute, (*q.shape[:-1], k.shape[-2]), v, sources)

    def _generated(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms, seen: int
    ) -> torch.Tensor | None:
        """The outputs, or None where only the original operations are known to be right."""
        warm = self.site.temperature
        factor = None if warm is None else terms[warm.index]
        if warm is not None and factor is not None:
            q = q / factor if warm.divide else q * factor
        new, keys, cross = q.shape[-2], k.shape[-2], self.site.cross
        if keys > seen + new and not cross:  # a static cache shows its whole length
            keys = seen + new
            k, v = k[:, :, :keys], v[:, :, :keys]
        if keys < new and not cross:
            return None
        if keys < seen + new and not cross and not self._relative:
            return None
        plain = not (self.site.has_bias or self.site.sinks)
        if self.site.mask.given:
            return None if seen or not plain else self._labelled(q, k, v, terms)
        first = self._first_seen(new, keys)
        found = reading.read(self.site, terms, seen, new, first, keys, q.shape[0])
        sinks = reading.sinks_of(self.site, terms)
        if isinstance(found, str) or (self.site.sinks and sinks is None):
            return None
        hooks = {"key_lengths": found.lengths, "bias": found.bias, "sinks": sinks}
        more = {name: x for name, x in hooks.items() if x is not None}
        grad = self._grad(q, k, v, *more.values())
        if new == 1 and not grad and not more.keys() - {"sinks"} and first is not None:
            decode = resolve(self._decode, q.device, v.dtype)
            return None if decode.backend == "reference" else _one(decode, q, k, v, first, sinks)
        kernel = self._kernel(q, k, v, 0 if cross else keys - new, grad, found.mask)
        if kernel.backend == "reference":
            return None
        out: torch.Tensor = kernel.run(q, k, v, **more)[0]
        return out

    @property
    def _relative(self) -> bool:
        return all(isinstance(a, _RELATIVE) for a in self.site.mask.atoms)

    def _labelled(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: Terms
    ) -> torch.Tensor | None:
        """Attention of a call whose mask holds documents or groups; row by row of the batch."""
        new = q.shape[-2]
        given = [t for i, t in enumerate(terms) if t is not None and self.site.terms[i] != "none"]
        if k.shape[-2] != new or not given or torch.compiler.is_compiling():
            return None
        try:
            split = site_terms.split(self.site, terms, 0, new).of_batch(q.shape[0])
        except UnsupportedError:
            return None
        labels = split.labels
        if labels is None or not (
            self._packs or split.valid is None or reading.on_the_right(split.valid)
        ):
            return None
        pieces = self._documents if self._packs else self._groups
        rows: list[torch.Tensor] = []
        for b, row in enumerate(labels):
            out = pieces(q[b : b + 1], k[b : b + 1], v[b : b + 1], row)
            if out is None:
                return None
            rows.append(out)
        return torch.cat(rows)

    @property
    def _packs(self) -> bool:
        return any(isinstance(a, Documents) for a in self.site.mask.atoms)

    def _documents(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor | None:
        """One row of documents side by side; None if they are mixed."""
        cu_seqlens = boundaries(labels)
        kernel = self._kernel(q, k, v, 0, self._grad(q, k, v))
        if cu_seqlens is None or kernel.backend == "reference":
            return None
        out: torch.Tensor = kernel.run(q, k, v, cu_seqlens=cu_seqlens)[0]
        return out

    def _groups(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor | None:
        """One row: queries of a group see all keys up to its end, others see those before them."""
        # A group is an interval [start, end]; tokens outside of groups are intervals of one.
        cu = boundaries(labels)
        if cu is None:
            return None
        edges = [int(x) for x in cu]
        pieces: list[tuple[int, int, bool]] = []
        for start, end in itertools.pairwise(edges):
            whole = end - start > 1
            if pieces and not whole and not pieces[-1][2]:
                pieces[-1] = (pieces[-1][0], end, False)
            else:
                pieces.append((start, end, whole))
        if len(pieces) > _MOST_PIECES:
            return None
        outs = []
        for start, end, whole in pieces:
            part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
            mask = Mask() if whole else Mask((Causal(),))
            kernel = self._kernel(*part, start, self._grad(*part), mask)
            if kernel.backend == "reference":
                return None
            outs.append(kernel.run(*part)[0])
        return torch.cat(outs, dim=2)

    @staticmethod
    def _grad(*tensors: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def _first_seen(self, new: int, keys: int) -> int | None:
        """The first key that a single new token sees, all later ones being seen too, else None."""
        if new != 1:
            return None
        window = self.site.mask.window
        first = 0 if window is None or self.site.kind != "causal" else max(0, keys - window)
        plain = all(isinstance(a, (Causal, Window, KeyPadding)) for a in self.site.mask.atoms)
        return first if plain else None

    @cached_property
    def _decode(self) -> Decode:
        heads = self.site.heads
        return Decode(heads.key_dim, heads.value_dim, self.site.scale, self.site.softcap)

    def _packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms,
        need_weights: bool,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of a packed row (see `packing`), whose sequences do not see each other."""
        whole = q.shape[-2] == k.shape[-2] and q.shape[0] == 1
        plain = all(t is None or r == "none" for t, r in zip(terms, self.site.terms, strict=True))
        plain = plain and not (self.site.cross or self.site.has_bias or self.site.sinks)
        dropped = self.training and bool(self.site.dropout)
        if (
            not (whole and plain and self._relative)
            or need_weights
            or dropped
            or not reading.masks_alone(self.site)
        ):
            raise packing.CannotPackError
        kernel = self._kernel(q, k, v, 0, self._grad(q, k, v))
        if v.dtype not in _DTYPES or kernel.backend == "reference":
            raise packing.CannotPackError
        out: torch.Tensor = kernel.run(q, k, v, cu_seqlens=cu_seqlens)[0]
        return out

    def _kernel(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        offset: int,
        grad: bool,
        mask: Mask | None = None,
    ) -> Kernel:
        spec = _spec(
            self.site.mask.neutral() if mask is None else mask,
            k.shape[-1],
            v.shape[-1],
            self.site.scale,
            self.site.softcap,
            offset,
            self.site.sinks,
            self.site.has_bias,
        )
        return resolve(spec, q.device, v.dtype, grad)


def _one(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One new token; a sink takes its share of the weights afterwards."""
    if first:
        k, v = k[:, :, first:], v[:, :, first:]
    out: torch.Tensor
    out, lse = kernel.run(q, k, v)
    if sinks is None:
        return out
    share = torch.sigmoid(lse - sinks[:, None])[..., None]
    return (out.float() * share).to(out.dtype)


def _can_wait(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: int, cross: bool) -> bool:
    """Whether the attention weights may be computed later: from tensors of this call alone."""
    return not seen and (cross or k.shape[-2] == q.shape[-2]) and unwatched(q, k, v)


@lru_cache(maxsize=512)
def _spec(
    mask: Mask,
    key_dim: int,
    value_dim: int,
    scale: float,
    softcap: float | None,
    offset: int,
    sinks: bool,
    bias: bool,
) -> BlockSparse:
    return BlockSparse(
        key_dim, value_dim, scale, mask.predicate, softcap, sinks=sinks, bias=bias, offset=offset
    )
