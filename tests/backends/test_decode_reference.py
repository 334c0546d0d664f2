"""The reference of `Decode` against whole-matrix float64 attention, and merging of parts."""

from __future__ import annotations

import pytest
import torch
from attention_oracles import attention, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rewriter.backends.reference.decode import decode, merge
from rewriter.backends.registry import resolve
from rewriter.ir.decode import Decode


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def seen_by(lengths: torch.Tensor, n: int, S: int) -> torch.Tensor:
    """(B, 1, n, S) bool: token r of the n newest sees the keys t <= length - n + r."""
    last = lengths[:, None].long() - n + torch.arange(n)
    return (torch.arange(S) <= last[..., None])[:, None]


sizes = {
    "B": st.integers(1, 3),
    "kv": st.integers(1, 2),
    "group": st.integers(1, 3),
    "n": st.integers(1, 5),
    "S": st.integers(1, 300),
    "capped": st.booleans(),
    "sunk": st.booleans(),
}


@settings(max_examples=50, deadline=None)
@given(**sizes, given_lengths=st.booleans())
def test_contiguous(B, kv, group, n, S, capped, sunk, given_lengths):
    torch.manual_seed(S)
    q, k, v = normal(B, kv * group, n, 8), normal(B, kv, S, 8), normal(B, kv, S, 4)
    cap, sinks = 1.5 if capped else None, normal(kv * group) if sunk else None
    lengths = torch.randint(0, S + 1, (B,), dtype=torch.int32) if given_lengths else None
    out, lse = decode(Decode(8, 4, 0.3, cap, sunk), q, k, v, lengths=lengths, sinks=sinks)
    pairs = seen_by(torch.full((B,), S) if lengths is None else lengths, n, S)
    o, total = attention(q, k, v, pairs, scale=0.3, softcap=cap, sinks=sinks)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=40, deadline=None)
@given(**sizes, page=st.sampled_from([1, 3, 16]))
def test_paged_is_contiguous_behind_a_table(B, kv, group, n, S, capped, sunk, page):
    torch.manual_seed(S)
    count = -(-S // page)
    pool = torch.randperm(B * count + 2)
    table = pool[: B * count].view(B, count).int()
    k, v = normal(pool.numel(), kv, page, 8), normal(pool.numel(), kv, page, 4)
    lengths = torch.randint(0, S + 1, (B,), dtype=torch.int32)
    flat = [torch.stack([x[t].transpose(0, 1).flatten(1, 2) for t in table.long()]) for x in (k, v)]
    # Entries behind the end of a row are never read.
    for b in range(B):
        table[b, -(-int(lengths[b]) // page) :] = -1
    q = normal(B, kv * group, n, 8)
    cap, sinks = 1.5 if capped else None, normal(kv * group) if sunk else None
    spec = Decode(8, 4, 0.3, cap, sunk, "paged", page)
    out, lse = decode(spec, q, k, v, lengths=lengths, pages=table, sinks=sinks)
    pairs = seen_by(lengths, n, count * page)
    o, total = attention(q, *flat, pairs, scale=0.3, softcap=cap, sinks=sinks)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 100), min_size=1, max_size=3))
def test_ring_holds_the_last_keys(S, lengths):
    torch.manual_seed(S)
    B, longest = len(lengths), max([*lengths, 1])
    q, keys, values = normal(B, 4, 1, 8), normal(B, 2, longest, 8), normal(B, 2, longest, 8)
    k, v = normal(B, 2, S, 8), normal(B, 2, S, 8)
    pairs = torch.zeros(B, 1, 1, longest, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for t in range(max(0, length - S), length):
            k[b, :, t % S], v[b, :, t % S] = keys[b, :, t], values[b, :, t]
            pairs[b, ..., t] = True
    spec = Decode(8, 8, 0.3, cache="ring")
    out, lse = decode(spec, q, k, v, lengths=torch.tensor(lengths, dtype=torch.int32))
    o, total = attention(q, keys, values, pairs, scale=0.3)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 4), st.booleans())
def test_gathered_slots(S, n, sunk):
    torch.manual_seed(S)
    B, kv, group = 2, 2, 3
    chosen = torch.rand(B, kv, S) < 0.3
    index = torch.full((B, kv, int(chosen.sum(-1).max()) + 1), -1, dtype=torch.int32)
    for b in range(B):
        for g in range(kv):
            slots = chosen[b, g].nonzero()[:, 0].int()
            index[b, g, : slots.numel()] = slots
    q, k, v = normal(B, kv * group, n, 8), normal(B, kv, S, 8), normal(B, kv, S, 4)
    sinks = normal(kv * group) if sunk else None
    spec = Decode(8, 4, 0.3, sinks=sunk, cache="gathered")
    out, lse = decode(spec, q, k, v, index=index, sinks=sinks)
    pairs = chosen.repeat_interleave(group, 1)[:, :, None]
    o, total = attention(q, k, v, pairs, scale=0.3, sinks=sinks)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.floats(0.0, 1.0))
def test_parts_merge_to_the_whole(S, parts, density):
    torch.manual_seed(S)
    q, k, v = normal(2, 4, 3, 8), normal(2, 2, S, 8), normal(2, 2, S, 8)
    owner = torch.where(torch.rand(S) < density, torch.randint(0, parts, (S,)), -1)
    results = []
    for part in range(parts):
        slots = (owner == part).nonzero()[:, 0].int()
        index = torch.cat((slots, slots.new_full((1,), -1))).expand(2, 2, -1)
        results.append(decode(Decode(8, 8, 2.0, cache="gathered"), q, k, v, index=index))
    out, lse = merge(results)
    o, total = attention(q, k, v, owner >= 0, scale=2.0)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


def test_merge_is_stable_for_large_sums_and_keeps_dtypes():
    outs = [torch.ones(1, 1, 1, 2, dtype=torch.bfloat16) * s for s in (1, 3)]
    sums = [torch.full((1, 1, 1), s) for s in (1e4, 1e4)]
    out, lse = merge(list(zip(outs, sums, strict=True)))
    assert out.dtype == torch.bfloat16 and (out == 2).all()
    assert float(lse) == pytest.approx(1e4 + 0.6931, rel=1e-6)


def test_the_newest_tokens_are_the_last_rows_of_causal_attention():
    torch.manual_seed(0)
    q, k, v = normal(2, 6, 40, 8), normal(2, 2, 40, 8), normal(2, 2, 40, 8)
    full = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    out, _ = decode(Decode(8, 8, 0.3), q[:, :, -4:], k, v)
    close(out, full[:, :, -4:].double(), 1e-5)


@pytest.mark.parametrize("cache", ["contiguous", "gathered"])
def test_gradcheck(cache):
    torch.manual_seed(1)
    shapes = ((2, 4, 2, 3), (2, 2, 5, 3), (2, 2, 5, 2))
    inputs = [normal(*s, dtype=torch.float64).requires_grad_() for s in shapes]
    inputs.append(normal(4, dtype=torch.float64).requires_grad_())
    spec = Decode(3, 2, 0.5, 2.0, True, cache)
    if cache == "gathered":
        where = {"index": torch.tensor([[[0, 3, -1], [1, 2, 4]], [[-1, -1, -1], [4, -1, -1]]])}
    else:
        where = {"lengths": torch.tensor([5, 1])}

    def run(q, k, v, sinks):
        return decode(spec, q, k, v, sinks=sinks, **where)

    assert torch.autograd.gradcheck(run, inputs)


def test_merged_gradients_are_those_of_the_whole():
    torch.manual_seed(2)
    q, k, v = (normal(1, 2, n, 4, dtype=torch.float64).requires_grad_() for n in (1, 9, 9))
    spec = Decode(4, 4, 0.5)

    def whole(q, k, v):
        return decode(spec, q, k, v)

    def parts(q, k, v):
        return merge([decode(spec, q, k[:, :, s], v[:, :, s]) for s in (slice(4), slice(4, 9))])

    assert torch.autograd.gradcheck(parts, (q, k, v))
    for a, b in zip(whole(q, k, v), parts(q, k, v), strict=True):
        close(a, b.detach(), 1e-12)


@pytest.mark.parametrize(
    ("spec", "extra", "message"),
    [
        (Decode(4, 4, 1.0, cache="ring"), {}, "one token at a time"),
        (Decode(4, 4, 1.0, cache="paged", page=2), {}, "page table"),
        (Decode(4, 4, 1.0), {"index": torch.zeros(1, 1, 1)}, "gathered"),
        (
            Decode(4, 4, 1.0, cache="gathered"),
            {"index": torch.zeros(1, 1, 1), "lengths": torch.ones(1)},
            "no lengths",
        ),
    ],
)
def test_inputs_of_another_cache_are_refused(spec, extra, message):
    q, k, v = normal(1, 1, 2, 4), normal(1, 1, 6, 4), normal(1, 1, 6, 4)
    with pytest.raises(ValueError, match=message):
        decode(spec, q, k, v, **extra)


def test_the_reference_backend_serves_it(monkeypatch):
    monkeypatch.setenv("ATTENTION_REWRITER_BACKENDS", "reference")
    kernel = resolve(Decode(4, 4, 1.0), "cpu", torch.float32)
    q, k, v = normal(1, 1, 1, 4), normal(1, 1, 6, 4), normal(1, 1, 6, 4)
    assert kernel.backend == "reference"
    assert torch.equal(kernel.run(q, k, v)[0], decode(Decode(4, 4, 1.0), q, k, v)[0])
