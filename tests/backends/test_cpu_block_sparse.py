"""Generated block-sparse attention on CPU against stock attention and float64 whole matrices."""

from __future__ import annotations

import pytest
import sympy
import torch
from attention_cases import (
    DENSE,
    EVERY,
    HEADS,
    HOOKS,
    LISTED,
    NARROW,
    agree,
    causal,
    double,
    drawn,
    everywhere,
    mixed,
    qkv,
    run,
    same_sequence,
    sizes,
)
from attention_cases import target as target
from attention_oracles import attention, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rewriter.backends.cpu import block_sparse as cpu
from rewriter.backends.cpu.target import VARIABLE, host_target
from rewriter.backends.inputs import BlockSparseInputs
from rewriter.errors import UnsupportedError
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.mask import I, J


@everywhere
@settings(max_examples=25, **drawn)
@given(**sizes, padded=st.booleans(), seed=st.integers(0, 999))
def test_causal_is_stock_attention(B, kv, n, padded, seed):
    torch.manual_seed(seed)
    x = dict(zip("qkv", qkv(DENSE, B, kv, n, n), strict=True))
    mask, integers = causal(n, n)[None, None], {}
    if padded:
        integers["key_lengths"] = torch.randint(0, n + 1, (B,), dtype=torch.int32)
        mask = mask & (torch.arange(n) < integers["key_lengths"][:, None, None, None])
    grad = torch.randn(B, HEADS, n, 64)
    out, lse, grads = run(DENSE, x, grad, **integers)
    y = double(x)
    expected = scaled_dot_product_attention(
        y["q"], y["k"], y["v"], mask.expand(B, HEADS, n, n), enable_gqa=True
    )
    close(out, expected, 1e-5)
    assert torch.equal(lse == -torch.inf, ~mask.any(-1).expand_as(lse))
    assert all(g.isfinite().all() for g in grads[:3])
    agree(y, grads, expected, grad)


@everywhere
@settings(max_examples=12, **drawn)
@given(n=st.integers(1, 300), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_packed_sequences(n, cuts):
    torch.manual_seed(n)
    x = dict(zip("qkv", qkv(DENSE, 1, 2, n, n), strict=True))
    ends = sorted({c % (n + 1) for c in cuts} | {0, n})
    grad = torch.randn(1, HEADS, n, 64)
    cu = torch.tensor(ends, dtype=torch.int32)
    out, lse, grads = run(DENSE, x, grad, cu_seqlens=cu)
    y = double(x)
    mask = (causal(n, n) & same_sequence(ends, n))[None, None]
    expected, total = attention(y["q"], y["k"], y["v"], mask, scale=0.125)
    close(out, expected, 1e-5)
    close(lse, total, 1e-5)
    agree(y, grads, expected, grad)


@everywhere
@settings(max_examples=12, **drawn)
@given(**sizes, keys=st.integers(1, 300), seed=st.integers(0, 999))
def test_every_hook_under_a_mask_of_all_atoms(B, kv, n, keys, seed):
    torch.manual_seed(seed)
    n = min(n, 150)
    x = dict(zip("qkv", qkv(EVERY, B, kv, n, keys), strict=True))
    x["sinks"], x["slopes"] = torch.randn(HEADS), torch.rand(HEADS) * 0.2
    x["bias"] = torch.randn((1, B)[seed % 2], (1, HEADS)[seed // 2 % 2], n, keys)
    x["temperature"] = torch.rand(HEADS, n) + 0.5
    grad = torch.randn(B, HEADS, n, 40)
    out, lse, grads = run(EVERY, x, grad)
    y = double(x)
    hooks = {name: y[name] for name in HOOKS}
    expected, total = attention(
        *(y["q"], y["k"], y["v"], mixed(n, keys, 3)[None]),
        **{"scale": 0.2, "softcap": 5.0, "offset": 3, **hooks},
    )
    close(out, expected, 1e-5)
    close(lse, total, 1e-5)
    agree(y, grads, expected, grad)


@everywhere
@settings(max_examples=12, **drawn)
@given(**sizes, seed=st.integers(0, 999))
def test_run_time_lists(B, kv, n, seed):
    torch.manual_seed(seed)
    x = dict(zip("qkv", qkv(LISTED, B, kv, n, n), strict=True))
    count = -(-n // 32)
    chosen = torch.rand(B, kv, count, count) < 0.5
    number = torch.arange(count).expand_as(chosen)
    listed = torch.where(chosen, number, count).sort(-1).values
    blocks = torch.where(listed == count, -1, listed).int()
    grad = torch.randn(B, HEADS, n, 96)
    out, lse, grads = run(LISTED, x, grad, blocks=blocks)
    y = double(x)
    seen = chosen.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :n, :n]
    mask = seen.repeat_interleave(HEADS // kv, 1) & causal(n, n)
    expected, _ = attention(y["q"], y["k"], y["v"], mask, scale=0.1, sigmoid=True)
    close(out, expected, 1e-5)
    assert not lse.any()
    agree(y, grads, expected, grad)


@pytest.mark.parametrize("target", ["wide_on_avx2", "tiles_on_avx2", "avx512_bf16"], indirect=True)
@pytest.mark.usefixtures("target")
def test_packed_bf16_on_wide_vectors():
    """The packings for bf16 instructions, on them or on an emulation with the same rounding."""
    for n in (1, 63, 65, 130, 299):
        torch.manual_seed(n)
        q, k, v = qkv(NARROW, 2, 2, n, n, torch.bfloat16)
        out, lse = cpu.forward(NARROW, BlockSparseInputs(q, k, v))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = (j <= i) & ((i - j < 50) | (j < 3))
        expected, total = attention(q, k, v, mask[None, None], scale=0.2)
        assert out.dtype == torch.bfloat16
        close(out, expected, 2e-2)
        close(lse, total, 1e-5)


def test_where_the_queries_begin_is_an_argument_of_the_kernel():
    """Parts of a prompt against one cache share a kernel and give what the whole prompt gives."""
    torch.manual_seed(5)
    q, k, v = (torch.randn(1, HEADS, 90, 64) for _ in range(3))
    whole, _ = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    kernels = set()
    for at in (0, 31, 62):
        spec = BlockSparse(64, 64, 0.125, offset=at)
        found = cpu.find(spec, torch.float32, "forward")
        assert not isinstance(found, str)
        kernels.add(id(found))
        end = min(at + 31, 90)
        part = BlockSparseInputs(q[:, :, at:end], k[:, :, :end], v[:, :, :end])
        close(cpu.forward(spec, part)[0], whole[:, :, at:end].double(), 1e-6)
    assert len(kernels) == 1


def test_a_kernel_belongs_to_its_instruction_set(monkeypatch):
    monkeypatch.setenv(VARIABLE, "portable")
    narrow = cpu.find(DENSE, torch.float32, "forward")
    monkeypatch.delenv(VARIABLE)
    host = cpu.find(DENSE, torch.float32, "forward")
    assert not isinstance(narrow, str) and not isinstance(host, str)
    assert narrow[0].unit.target.isa == "portable" and host[0].unit.target == host_target()


@everywhere
def test_differences_of_large_scores_are_exact():
    """Scores around +-1e4 that differ by small amounts, exact in float32."""
    torch.manual_seed(0)
    q, k = (torch.randint(-8, 9, (1, HEADS, 200, 64)).float() * 12 for _ in range(2))
    k[:, :, 1::2] = k[:, :, ::2]
    k[:, :, 1::2, 0] += 1 / 64
    v = torch.randn(1, HEADS, 200, 64)
    assert (q @ k.mT * 0.125).abs().max() > 1e4
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    out, _, grads = run(DENSE, {"q": q, "k": k, "v": v}, torch.ones_like(v))
    close(out, expected, 1e-5)
    assert all(g.isfinite().all() for g in grads[:3])


def test_nan_stays_where_it_is():
    """A NaN reaches the rows that see it, and no other row."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, HEADS, 150, 64) for _ in range(3))
    k[0, 1, 100, 5] = torch.nan
    v[0, 2, 70, :] = torch.nan
    q[0, 3, 20, 0] = torch.nan
    out, _ = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    bad = out.isnan().any(-1)[0]
    expected = torch.zeros(HEADS, 150, dtype=torch.bool)
    expected[1, 100:] = expected[2, 70:] = expected[3, 20] = True
    assert torch.equal(bad, expected)


@everywhere
def test_keys_behind_their_length_are_never_read():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, HEADS, 130, 64) for _ in range(3))
    k[0, :, 90:] = v[0, :, 90:] = torch.nan
    lengths = torch.tensor([90, 0], dtype=torch.int32)
    grad = torch.randn_like(q)
    out, lse, grads = run(DENSE, {"q": q, "k": k, "v": v}, grad, key_lengths=lengths)
    assert out.isfinite().all() and not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert all(g.isfinite().all() for g in grads[:3])


def test_no_keys_and_no_rows():
    for M, N in ((5, 0), (0, 5)):
        q, k = torch.randn(1, 2, M, 64), torch.randn(1, 2, N, 64)
        x = BlockSparseInputs(q, k, k)
        out, lse = cpu.forward(DENSE, x)
        assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
        assert not any(g.any() for g in cpu.backward(DENSE, x, out, lse, out)[:3])


@everywhere
def test_threads_change_nothing():
    torch.manual_seed(3)
    x = dict(zip("qkv", qkv(DENSE, 1, 1, 200, 200), strict=True))
    x = {name: t[:, :1] for name, t in x.items()}
    grad = torch.randn(1, 1, 200, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, lse, grads = run(DENSE, x, grad)
            results.append((out, lse, *grads[:3]))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        close(two, one.double(), 1e-6)


def test_reasons_to_decline():
    reason = cpu.decline(DENSE, torch.float16, False)
    assert reason is not None and "float16" in reason
    reason = cpu.decline(BlockSparse(1024, 64, 1.0), torch.float32, False)
    assert reason is not None and "512" in reason
    far = BlockSparse(64, 64, 1.0, sympy.Le(J * 100_000, I))
    reason = cpu.decline(far, torch.float32, False)
    assert reason is not None and "32 bits" in reason
    with pytest.raises(UnsupportedError, match="float64"):
        x = torch.randn(1, 1, 4, 64, dtype=torch.float64)
        cpu.forward(DENSE, BlockSparseInputs(x, x, x))
