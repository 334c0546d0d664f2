"""Generated decode kernels on CPU against float64 whole-matrix attention."""

from __future__ import annotations

import pytest
import torch
from attention_oracles import attention, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.backends.cpu import decode as cpu
from rewriter.backends.inputs import DecodeInputs
from rewriter.backends.reference.decode import merge
from rewriter.errors import UnsupportedError
from rewriter.ir.decode import Decode

PLAIN = Decode(64, 64, 0.125)
RING = Decode(24, 12, 0.3, softcap=4.0, sinks=True, cache="ring")
PAGED = Decode(80, 96, 0.1, sinks=True, cache="paged", page=16)
GATHERED = Decode(6, 20, 0.4, cache="gathered")

sizes = {
    "B": st.integers(1, 2),
    "kv": st.integers(1, 3),
    "group": st.integers(1, 7),
    "n": st.integers(1, 5),
    "S": st.integers(1, 700),
    "seed": st.integers(0, 99),
}


def cache(B: int, kv: int, S: int, D: int) -> Tensor:
    """Tokens before heads in memory."""
    return torch.randn(B, S, kv, D).transpose(1, 2)


def seen_by(lengths: Tensor, n: int, S: int) -> Tensor:
    """(B, 1, n, S) bool: token r of the n newest sees the keys t <= length - n + r."""
    last = lengths[:, None].long() - n + torch.arange(n)
    return (torch.arange(S) <= last[..., None])[:, None]


@settings(max_examples=25, deadline=None)
@given(**sizes, padded=st.booleans())
def test_contiguous(B, kv, group, n, S, seed, padded):
    torch.manual_seed(seed)
    q = torch.randn(B, n, kv * group, 64).transpose(1, 2)
    k, v = cache(B, kv, S, 64), cache(B, kv, S, 64)
    lengths = torch.randint(0, S + 1, (B,), dtype=torch.int32) if padded else None
    out, lse = cpu.forward(PLAIN, DecodeInputs(q, k, v, lengths=lengths))
    pairs = seen_by(torch.full((B,), S) if lengths is None else lengths, n, S)
    expected, total = attention(q, k, v, pairs, scale=0.125)
    close(out, expected, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=15, deadline=None)
@given(**sizes, padded=st.booleans())
def test_contiguous_in_bf16(B, kv, group, n, S, seed, padded):
    bf16_case(B, kv, group, n, S, seed, padded)


@pytest.mark.parametrize("isa", ["tiles_on_avx2", "wide_on_avx2", "avx2"])
@pytest.mark.parametrize(("group", "n"), [(1, 1), (3, 1), (7, 2)])
def test_contiguous_in_bf16_on_other_instructions(isa, group, n, monkeypatch):
    monkeypatch.setenv("ATTENTION_REWRITER_ISA", isa)
    cpu.find.cache_clear()
    try:
        for S in (5, 16, 131):
            bf16_case(2, 2, group, n, S, S, True)
    finally:
        cpu.find.cache_clear()


def bf16_case(B: int, kv: int, group: int, n: int, S: int, seed: int, padded: bool) -> None:
    """Keys and values behind the last one are NaN."""
    torch.manual_seed(seed)
    q = torch.randn(B, n, kv * group, 64).bfloat16().transpose(1, 2)
    k, v = (cache(B, kv, S, d).bfloat16() for d in (64, 96))
    lengths = torch.randint(1, S + 1, (B,), dtype=torch.int32) if padded else None
    used = torch.full((B,), S) if lengths is None else lengths
    pairs = seen_by(used, n, S)
    expected, total = attention(q, k, v, pairs, scale=-0.2)
    for b, length in enumerate(used.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    spec = Decode(64, 96, -0.2)
    out, lse = cpu.forward(spec, DecodeInputs(q, k, v, lengths=lengths))
    close(out, expected, 2e-2)
    close(lse, total, 1e-5)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_ring_with_soft_cap_and_sinks(B, kv, group, n, S, seed):
    torch.manual_seed(seed)
    q, sinks = torch.randn(B, kv * group, 1, 24), torch.randn(kv * group)
    k, v = cache(B, kv, S, 24), cache(B, kv, S, 12)
    lengths = torch.randint(0, 2 * S, (B,), dtype=torch.int32)
    x = DecodeInputs(q, k, v, lengths=lengths, sinks=sinks)
    out, lse = cpu.forward(RING, x)
    pairs = (torch.arange(S) < lengths[:, None])[:, None, None]
    expected, total = attention(q, k, v, pairs, scale=0.3, softcap=4.0, sinks=sinks)
    close(out, expected, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_pages_in_bf16(B, kv, group, n, S, seed):
    torch.manual_seed(seed)
    count = -(-S // 16)
    pool = torch.randperm(B * count + 2)
    table = pool[: B * count].view(B, count).int()
    k = torch.randn(pool.numel(), kv, 16, 80).bfloat16()
    v = torch.randn(pool.numel(), kv, 16, 96).bfloat16()
    q, sinks = torch.randn(B, kv * group, n, 80).bfloat16(), torch.randn(kv * group)
    lengths = torch.randint(0, S + 1, (B,), dtype=torch.int32)
    x = DecodeInputs(q, k, v, lengths=lengths, pages=table, sinks=sinks)
    out, lse = cpu.forward(PAGED, x)
    assert out.dtype == torch.bfloat16
    flat = [t[table.long()].transpose(1, 2).flatten(2, 3) for t in (k, v)]
    pairs = seen_by(lengths, n, count * 16)
    expected, total = attention(q, *flat, pairs, scale=0.1, sinks=sinks)
    close(out, expected, 2e-2)
    close(lse, total, 1e-5)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_gathered_slots(B, kv, group, n, S, seed):
    torch.manual_seed(seed)
    q = torch.randn(B, kv * group, n, 6)
    k, v = cache(B, kv, S, 6), cache(B, kv, S, 20)
    chosen = torch.rand(B, kv, S) < 0.3
    index = torch.where(chosen, torch.arange(S), S).sort(-1).values
    index = torch.where(index == S, -1, index).int()
    out, lse = cpu.forward(GATHERED, DecodeInputs(q, k, v, index=index))
    pairs = chosen.repeat_interleave(group, 1)[:, :, None]
    expected, total = attention(q, k, v, pairs, scale=0.4)
    close(out, expected, 1e-5)
    close(lse, total, 1e-5)


def test_threads_split_the_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 2, 64), cache(1, 1, 1500, 64), cache(1, 1, 1500, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu.forward(PLAIN, DecodeInputs(q, k, v)))
    finally:
        torch.set_num_threads(before)
    close(results[1][0], results[0][0].double(), 1e-6)
    close(results[1][1], results[0][1].double(), 1e-6)


def test_parts_merge_to_the_whole():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 3, 1, 64), cache(1, 1, 300, 64), cache(1, 1, 300, 64)
    whole = cpu.forward(PLAIN, DecodeInputs(q, k, v))
    parts = [
        cpu.forward(PLAIN, DecodeInputs(q, k[:, :, at], v[:, :, at]))
        for at in (slice(0, 130), slice(130, 300))
    ]
    for mine, expected in zip(merge(parts), whole, strict=True):
        close(mine, expected.double(), 1e-6)


def test_large_scores_and_nan():
    torch.manual_seed(2)
    q = torch.randint(-8, 9, (1, 2, 3, 64)).float() * 12
    k = torch.randint(-8, 9, (1, 2, 200, 64)).float() * 12
    k[:, :, 1::2] = k[:, :, ::2]
    k[:, :, 1::2, 0] += 1 / 64
    v = torch.randn(1, 2, 200, 64)
    pairs = seen_by(torch.tensor([200]), 3, 200)
    expected, total = attention(q, k, v, pairs, scale=0.125)
    v[:, :, 199] = torch.nan  # only the last of the three tokens sees it
    out, lse = cpu.forward(PLAIN, DecodeInputs(q, k, v))
    close(out[:, :, :2], expected[:, :, :2], 1e-5)
    assert out[:, :, 2].isnan().all()
    close(lse, total, 1e-6)


def test_reasons_to_decline():
    assert cpu.decline(PLAIN, torch.float32, False) is None
    assert "backward" in str(cpu.decline(PLAIN, torch.float32, True))
    assert "float16" in str(cpu.decline(PLAIN, torch.float16, False))
    with pytest.raises(UnsupportedError, match="dtype"):
        q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 4, 64)
        cpu.forward(PLAIN, DecodeInputs(q.bfloat16(), k, k))
