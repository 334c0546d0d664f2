"""Oracle and random calls of `BlockSparse`: dense float64 scores under an explicit mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs
from rewriter.ir.block_sparse import BlockSparse

Plain = Callable[[Tensor, Tensor, Tensor], Tensor]
FIELDS = ("q", "k", "v", "sinks", "slopes", "bias", "temperature")


@dataclass(frozen=True)
class AttentionCase:
    """A spec, the same mask as arithmetic on (h, i, j), and the sizes of a call."""

    name: str
    spec: BlockSparse
    plain: Plain
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    rows: int = 100
    keys: int = 100
    lengths: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    bias_shape: tuple[int, int] = (1, 4)
    size: float = 1.0
    listed: list[list[int]] = field(default_factory=list)


def make(case: AttentionCase, dtype: torch.dtype, seed: int = 0) -> BlockSparseInputs:
    g = torch.Generator().manual_seed(seed)
    spec, B, H, M, N = case.spec, case.batch, case.heads, case.rows, case.keys

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    q = rand(B, H, M, spec.key_dim) * case.size
    k = rand(B, case.kv_heads, N, spec.key_dim)
    if case.size > 1:  # whole numbers and quarters, so that float32 holds the logits exactly
        q, k = q.round(), (k * 4).round() / 4
    lists = torch.tensor(case.listed, dtype=torch.int32) if case.listed else None
    return BlockSparseInputs(
        q.to(dtype),
        k.to(dtype),
        rand(B, case.kv_heads, N, spec.value_dim).to(dtype),
        rand(H) if spec.sinks else None,
        rand(H).abs() * 0.1 if spec.slopes else None,
        rand(*case.bias_shape, M, N) if spec.bias else None,
        rand(H, M).abs() if spec.temperature else None,
        torch.tensor(case.lengths, dtype=torch.int32) if case.lengths else None,
        torch.tensor(case.cuts, dtype=torch.int32) if case.cuts else None,
        None if lists is None else lists.expand(B, case.kv_heads, -1, -1),
    )


def wide(x: BlockSparseInputs) -> BlockSparseInputs:
    given: dict[str, Any] = {n: getattr(x, n) for n in FIELDS if getattr(x, n) is not None}
    return replace(x, **{n: t.double() for n, t in given.items()})


def dense(case: AttentionCase, x: BlockSparseInputs) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps, differentiable."""
    spec, x = case.spec, wide(x)
    group = case.heads // case.kv_heads
    k, v = x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1)
    s = x.q @ k.transpose(-1, -2) * spec.scale
    if x.temperature is not None:
        s = s * x.temperature[..., None]
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    i = torch.arange(case.rows)[:, None] + spec.offset
    j = torch.arange(case.keys)[None, :]
    if x.slopes is not None:
        s = s - x.slopes[:, None, None] * (i - j)
    if x.bias is not None:
        s = s + x.bias
    seen = visible(case, x, i, j)
    if spec.weight == "sigmoid":
        p = torch.where(seen, torch.sigmoid(s), 0.0)
        return p @ v, torch.zeros(s.shape[:-1], dtype=torch.float64)
    s = torch.where(seen, s, -torch.inf)
    if x.sinks is not None:
        sink = x.sinks[None, :, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat((s, sink), -1)
        v = torch.cat((v, torch.zeros_like(v[:, :, :1])), 2)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(torch.where(empty, 0.0, s), -1)
    return torch.where(empty, 0.0, p) @ v, torch.logsumexp(s, -1)


def visible(case: AttentionCase, x: BlockSparseInputs, i: Tensor, j: Tensor) -> Tensor:
    h = torch.arange(case.heads)[:, None, None]
    seen = case.plain(h, i, j).expand(case.heads, case.rows, case.keys)[None]
    if x.key_lengths is not None:
        seen = seen & (j < x.key_lengths[:, None, None, None])
    if case.cuts:
        home = torch.full((max(case.rows, case.keys),), -1)
        for n, (a, b) in enumerate(pairwise(case.cuts)):
            home[a:b] = n
        seen = seen & (home[i] == home[j]) & (home[i] >= 0)
    if case.listed:
        allowed = torch.zeros(case.rows, case.keys, dtype=torch.bool)
        for r, blocks in enumerate(case.listed):
            for n in blocks:
                size = case.spec.block
                if n >= 0:
                    allowed[r * size : (r + 1) * size, n * size : (n + 1) * size] = True
        seen = seen & allowed
    return seen
