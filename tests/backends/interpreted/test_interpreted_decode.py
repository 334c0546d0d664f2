"""Decode kernels against softmax in float64 over the keys of each row, listed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_recurrence_cases import error

from rewriter.backends.inputs import DecodeInputs
from rewriter.backends.triton import decode
from rewriter.ir.decode import Decode

BATCH, HEADS, KV_HEADS, SLOTS, PAGES = 2, 6, 2, 150, 9

CASES = [
    (Decode(16, 24, 0.3), 1, (150, 90)),
    (Decode(40, 16, 0.3, softcap=4.0, sinks=True), 3, (3, 150)),
    (Decode(40, 16, 0.3), 3, (2, 99)),
    (Decode(40, 16, 0.3, sinks=True), 1, (0, 1)),
    (Decode(16, 16, 0.3, cache="ring"), 1, (50, 900)),
    (Decode(16, 16, 0.3, cache="paged", page=12), 2, (40, 61)),
    (Decode(16, 16, 0.3, cache="gathered"), 2, ()),
]


def inputs(spec: Decode, tokens: int, lengths: tuple[int, ...], dtype: torch.dtype) -> DecodeInputs:
    g = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    kv = (PAGES, KV_HEADS, spec.page) if spec.cache == "paged" else (BATCH, KV_HEADS, SLOTS)
    index = torch.stack([torch.randperm(SLOTS, generator=g)[:30] for _ in range(4)])
    index[:, 25:] = -1
    pages = torch.stack([torch.randperm(PAGES, generator=g)[:6] for _ in range(BATCH)])
    return DecodeInputs(
        rand(BATCH, HEADS, tokens, spec.key_dim).to(dtype),
        rand(*kv, spec.key_dim).to(dtype),
        rand(*kv, spec.value_dim).to(dtype),
        torch.tensor(lengths, dtype=torch.int32) if lengths else None,
        pages.int() if spec.cache == "paged" else None,
        index.view(BATCH, KV_HEADS, 30).int() if spec.cache == "gathered" else None,
        rand(HEADS) if spec.sinks else None,
    )


def row(spec: Decode, x: DecodeInputs, b: int, h: int, r: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one new token of one head."""
    owner, n = h // (HEADS // KV_HEADS), x.q.shape[2]
    keys, values = [], []
    if x.index is not None:
        slots = [int(s) for s in x.index[b, owner] if s >= 0]
    else:
        length = int(x.lengths[b]) if x.lengths is not None else SLOTS
        last = length - n + r
        slots = list(range(min(length, SLOTS))) if spec.cache == "ring" else list(range(last + 1))
    for t in slots:
        if x.pages is not None:
            at = (int(x.pages[b, t // spec.page]), owner, t % spec.page)
        else:
            at = (b, owner, t)
        keys.append(x.k[at].double())
        values.append(x.v[at].double())
    score = torch.stack([x.q[b, h, r].double() @ k for k in keys]) if keys else torch.zeros(0)
    score = score.double() * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    if x.sinks is not None:
        score = torch.cat((score, x.sinks[h : h + 1].double()))
        values.append(torch.zeros(spec.value_dim, dtype=torch.float64))
    if not score.numel():
        return torch.zeros(spec.value_dim, dtype=torch.float64), torch.tensor(-torch.inf).double()
    return torch.softmax(score, 0) @ torch.stack(values), torch.logsumexp(score, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "tokens", "lengths"), CASES)
def test_decode(spec: Decode, tokens: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(spec, tokens, lengths, dtype)
    out, lse = decode.forward(spec, x)
    want, sums = torch.zeros(out.shape).double(), torch.zeros(lse.shape).double()
    for b in range(BATCH):
        for h in range(HEADS):
            for r in range(tokens):
                want[b, h, r], sums[b, h, r] = row(spec, x, b, h, r)
    assert error(out, want) <= (1e-5 if dtype == torch.float32 else 2e-3)
    seen = torch.isfinite(sums)
    assert torch.equal(torch.isfinite(lse), seen)
    assert error(lse[seen], sums[seen]) <= 1e-5
