"""Reference kernel of `Decode`, and the merge of partial results by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.backends.reference.normal import softmax
from rewriter.backends.reference.precision import full_precision, wide
from rewriter.ir.decode import Decode


def decode(
    spec: Decode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    index: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with the n newest tokens to a cache that holds them.

    Args:
        spec: what to compute.
        q: (B, H, n, Dk).
        k, v: (B, Hkv, S, D), or (pages, Hkv, page, D) when paged.
        lengths: (B,) int32. pages: (B, P) int32. index: (B, Hkv, L) int32. sinks: (H,).

    Returns:
        (B, H, n, Dv) in the dtype of v and the log-sum-exp (B, H, n), float32 (float64 for float64
        inputs); 0 and -inf for a row without keys.

    Raises:
        ValueError: the inputs are not those of the spec's cache.
    """
    problem = _problem(spec, q, lengths, pages, index)
    if problem is not None:
        raise ValueError(problem)
    B, H, n, Dk = q.shape
    if pages is not None:
        k, v = (_from_pages(x, pages) for x in (k, v))
    if index is not None:
        slots = index.long().clamp(min=0)[..., None]
        k, v = (x.gather(2, slots.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    Hkv, S = k.shape[1], k.shape[2]
    with full_precision(q.device):
        grouped = wide(q).reshape(B, Hkv, H // Hkv * n, Dk)
        score = (grouped @ wide(k).transpose(-1, -2)).view(B, H, n, S) * spec.scale
        if spec.softcap is not None:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        visible = _visible(spec, n, S, H, lengths, index, q.device)
        score = score.masked_fill(~visible, -torch.inf)
        weight, sums = softmax(score, sinks)
        out = weight.view(B, Hkv, H // Hkv * n, S) @ wide(v)
        return out.view(B, H, n, -1).to(v.dtype), sums


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the results over each.

    Args:
        parts: (out (..., Dv), log-sum-exp (...)) of every set, all of the same shape.

    Returns:
        The merged pair, in the dtypes of the first; 0 and -inf where no part sees a key.
    """
    sums = torch.stack([lse for _, lse in parts])
    top = sums.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (sums - top).exp()
    total = weight.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    outs = torch.stack([out.to(sums.dtype) for out, _ in parts])
    out = ((weight / safe)[..., None] * outs).sum(0)
    lse = (safe.log() + top).masked_fill(~some, -torch.inf)
    return out.to(parts[0][0].dtype), lse


def _problem(
    spec: Decode, q: Tensor, lengths: Tensor | None, pages: Tensor | None, index: Tensor | None
) -> str | None:
    if (pages is not None) != (spec.cache == "paged"):
        return "a page table belongs to a paged cache, and only there"
    if (index is not None) != (spec.cache == "gathered"):
        return "slots to gather belong to a gathered cache, and only there"
    if spec.cache == "gathered" and lengths is not None:
        return "a gathered cache has no lengths: leave the slots out of the index"
    if spec.cache == "ring" and q.shape[2] != 1:
        return f"a ring serves one token at a time, not {q.shape[2]}"
    return None


def _from_pages(x: Tensor, pages: Tensor) -> Tensor:
    """(pages, Hkv, page, D) to (B, Hkv, P * page, D); unused table entries may be anything."""
    picked = x[pages.long().clamp(0, x.shape[0] - 1)]
    return picked.transpose(1, 2).flatten(2, 3)


def _visible(
    spec: Decode,
    n: int,
    S: int,
    heads: int,
    lengths: Tensor | None,
    index: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(1|B, 1|H, 1|n, S) bool."""
    if index is not None:
        return (index >= 0).repeat_interleave(heads // index.shape[1], 1)[:, :, None]
    seen = torch.tensor([S], device=device) if lengths is None else lengths.long()
    slot = torch.arange(S, device=device)
    if spec.cache == "ring":
        # Once it is full every slot holds one of the last S keys.
        return (slot < seen[:, None])[:, None, None]
    last = seen[:, None] - n + torch.arange(n, device=device)
    return (slot <= last[..., None])[:, None]
