"""Sites and inputs for mixer tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewriter.ir.mask import Atom, Causal, KeyPadding, Mask
from rewriter.ir.site import (
    AddTerm,
    AttentionSite,
    FillTerm,
    HeadGroups,
    Scale,
    ScoreStep,
    Source,
    Spelling,
    TermRole,
)

CAUSAL = Mask((Causal(), KeyPadding()))
BOTH_WAYS = Mask((KeyPadding(),))


def make_site(
    mask: Mask = CAUSAL,
    spelling: Spelling = "sdpa",
    heads: tuple[int, int, int] = (4, 2, 8),
    score: tuple[ScoreStep, ...] | None = None,
    terms: tuple[TermRole, ...] = ("mask",),
    **facts: object,
) -> AttentionSite:
    """A site with `heads` = (query heads, key/value heads, width)."""
    step = FillTerm(0, -math.inf, keep=True) if spelling == "sdpa" else AddTerm(0)
    return AttentionSite(
        fqn="block.attention",
        index=0,
        heads=HeadGroups(*heads, heads[2]),
        score=score if score is not None else (Scale(heads[2] ** -0.5), step),
        terms=terms,
        mask=mask,
        spelling=spelling,
        source=Source("softmax"),
        **facts,  # type: ignore[arg-type]
    )


def qkv(site: AttentionSite, n: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    h = site.heads
    return (
        torch.randn(batch, h.query, n, h.key_dim, generator=g),
        torch.randn(batch, h.key_value, n, h.key_dim, generator=g),
        torch.randn(batch, h.key_value, n, h.value_dim, generator=g),
    )


def bool_mask(valid: Tensor, seen: int = 0, *atoms: Atom) -> Tensor:
    """(B, 1, n, seen + n) keep-mask of `valid` (B, seen + n) under the atoms (causal if none)."""
    total = valid.shape[1]
    i = torch.arange(seen, total)
    allow = Mask(atoms or (Causal(),)).dense(i, torch.arange(total))
    return allow[None, None] & valid[:, None, None, :]


def float_mask(keep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
