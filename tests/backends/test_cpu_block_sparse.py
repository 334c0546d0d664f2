"""Generated block-sparse attention on CPU against stock attention and float64 whole matrices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
from attention_oracles import attention, close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter.backends.cpu import block_sparse as cpu
from rewriter.backends.cpu.target import VARIABLE, Target, cpu_flags, host_target
from rewriter.backends.inputs import BlockSparseGrads, BlockSparseInputs
from rewriter.errors import UnsupportedError
from rewriter.ir.block_sparse import CAUSAL, BlockSparse, causal_window
from rewriter.ir.lookup import lookup
from rewriter.ir.mask import H, I, J

HEADS = 4
TABLE = np.random.default_rng(7).random((HEADS, 10, 10)) < 0.4
# Window or, for the first heads, every fifth key, or blocks of a random table.
MIXED = sympy.And(
    sympy.Le(J, I),
    sympy.Or(
        sympy.Lt(sympy.Abs(I - J - 3), 17),
        sympy.And(sympy.Lt(H, 2), sympy.Eq(sympy.Mod(J - 2 * I, 5), sympy.Mod(H, 5))),
        lookup(TABLE, H, sympy.floor(I / 33), sympy.floor((J - 6) / 33)),
    ),
)
DENSE = BlockSparse(64, 64, 0.125)
HOOKS = {"sinks": True, "slopes": True, "bias": True, "temperature": True}
EVERY = BlockSparse(24, 40, 0.2, MIXED, softcap=5.0, offset=3, **HOOKS)
LISTED = BlockSparse(80, 96, 0.1, CAUSAL, weight="sigmoid", block=32)
NARROW = BlockSparse(32, 16, 0.2, causal_window(50, 3))


def mixed(M: int, N: int, offset: int) -> Tensor:
    """MIXED in plain numpy."""
    h, i, j = np.ogrid[:HEADS, offset : offset + M, :N]
    rows, columns = i // 33, (j - 6) // 33
    inside = (rows < 10) & (columns >= 0) & (columns < 10)
    listed = inside & TABLE[h, np.minimum(rows, 9), np.clip(columns, 0, 9)]
    strided = (h < 2) & ((j - 2 * i) % 5 == h % 5)
    return torch.from_numpy((j <= i) & ((abs(i - j - 3) < 17) | strided | listed))


def causal(M: int, N: int) -> Tensor:
    return torch.ones(M, N, dtype=torch.bool).tril()


def same_sequence(ends: list[int], n: int) -> Tensor:
    out = torch.zeros(n, n, dtype=torch.bool)
    for start, end in pairwise(ends):
        out[start:end, start:end] = True
    return out


def qkv(spec: BlockSparse, B: int, kv: int, M: int, N: int, dtype=torch.float32):
    """Strided in different ways: heads inside tokens, rows with gaps, dense."""
    q = torch.randn(B, M, HEADS, spec.key_dim).transpose(1, 2)
    k = torch.randn(B, kv, N, spec.key_dim + 3)[..., 1:-2]
    v = torch.randn(B, kv, N, spec.value_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(spec: BlockSparse, x: dict[str, Tensor], grad: Tensor, **integers: Tensor):
    inputs = BlockSparseInputs(**x, **integers)
    out, lse = cpu.forward(spec, inputs)
    return out, lse, cpu.backward(spec, inputs, out, lse, grad)


def agree(x: dict[str, Tensor], found: BlockSparseGrads, out: Tensor, grad: Tensor) -> None:
    """Gradients within 1e-4 of float64 autograd; `close` scales by at least 1."""
    expected = torch.autograd.grad(out, list(x.values()), grad.double(), allow_unused=True)
    for name, g in zip(x, expected, strict=True):
        mine = getattr(found, name)
        close(mine, torch.zeros_like(mine).double() if g is None else g, 1e-4)


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double().requires_grad_() for name, t in x.items()}


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An instruction set by name; `tiles` is the real one where the processor has it."""
    isa = request.param
    if isa == "host":
        yield
        return
    if isa == "tiles":
        host = host_target()
        isa = host.isa if isinstance(host, Target) and host.tiles else "tiles_on_avx2"
    needed = {"avx512_bf16"} if isa == "avx512_bf16" else {"avx2", "fma"}
    if not needed <= cpu_flags():
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv(VARIABLE, isa)
    # float32 on tiles wherever it is possible, not only where it is faster.
    monkeypatch.setattr(cpu, "_least_keys", lambda *_: 0.0)
    monkeypatch.setattr(cpu.forms, "FEW", 0)
    monkeypatch.setattr(cpu.forms, "fits", lambda spec: spec.block % 32 == 0)
    yield


drawn = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def everywhere(test):
    """On this processor as it would be, and on tile registers wherever that is possible."""
    both = pytest.mark.parametrize("target", ["host", "tiles"], indirect=True)
    return both(pytest.mark.usefixtures("target")(test))


sizes = {"B": st.integers(1, 2), "kv": st.sampled_from([1, 2, 4]), "n": st.integers(1, 300)}


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


on_tiles = pytest.mark.parametrize("target", ["tiles"], indirect=True)
of_both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


@on_tiles
@of_both
@pytest.mark.usefixtures("target")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**sizes, keys=st.integers(1, 300), padded=st.booleans(), seed=st.integers(0, 999))
def test_tiles_are_stock_attention(dtype, B, kv, n, keys, padded, seed):
    """Lengths that divide nothing, values that are NaN behind their length, rows without keys."""
    torch.manual_seed(seed)
    q, k, v = qkv(DENSE, B, kv, n, keys, dtype)
    mask, integers = causal(n, keys)[None, None].expand(B, HEADS, n, keys), {}
    x = [t.double() for t in (q, k, v)]
    if padded:
        integers["key_lengths"] = torch.randint(0, keys + 1, (B,), dtype=torch.int32)
        behind = torch.arange(keys) >= integers["key_lengths"][:, None]
        mask = mask & ~behind[:, None, None]
        k = k.masked_fill(behind[:, None, :, None], torch.nan)
        v = v.masked_fill(behind[:, None, :, None], torch.nan)
    out, lse = cpu.forward(DENSE, BlockSparseInputs(q, k, v, **integers))
    expected = scaled_dot_product_attention(*x, mask, enable_gqa=True)
    close(out, expected.nan_to_num(), TOLERANCE[dtype])
    assert torch.equal(lse == -torch.inf, ~mask.any(-1))
    _, total = attention(*x, mask, scale=0.125)
    close(lse, total, 1e-5)


@on_tiles
@of_both
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("kv", [1, 4])
def test_tiles_with_hooks_lists_and_odd_widths(kv, dtype):
    tolerance = TOLERANCE[dtype]
    torch.manual_seed(kv)
    q, k, v = qkv(EVERY, 2, kv, 130, 161, dtype)
    hooks = {"sinks": torch.randn(HEADS), "slopes": torch.rand(HEADS) * 0.2}
    hooks |= {"bias": torch.randn(1, HEADS, 130, 161)}
    # Factors of either sign, and 0.
    hooks |= {"temperature": torch.randn(HEADS, 130).round(decimals=1)}
    out, lse = cpu.forward(EVERY, BlockSparseInputs(q, k, v, **hooks))
    more = {"scale": 0.2, "softcap": 5.0, "offset": 3, **hooks}
    expected, total = attention(q, k, v, mixed(130, 161, 3)[None], **more)
    close(out, expected, tolerance)
    close(lse, total, 1e-5)
    turned = BlockSparse(17, 33, -0.3, temperature=True)
    q, k, v = qkv(turned, 1, kv, 90, 90, dtype)
    temperature = hooks["temperature"][:, :90]
    out, lse = cpu.forward(turned, BlockSparseInputs(q, k, v, temperature=temperature))
    mask = causal(90, 90)[None, None]
    expected, total = attention(q, k, v, mask, scale=-0.3, temperature=temperature)
    close(out, expected, tolerance)
    close(lse, total, 1e-5)
    q, k, v = qkv(LISTED, 1, kv, 150, 150, dtype)
    blocks = torch.tensor([[0, -1, -1], [1, -1, -1], [0, 2, -1], [-1, -1, -1], [0, 3, 4]])
    out, _ = cpu.forward(
        LISTED, BlockSparseInputs(q, k, v, blocks=blocks.expand(1, kv, 5, 3).contiguous())
    )
    seen = torch.zeros(5, 5, dtype=torch.bool)
    for row, listed in enumerate(blocks):
        seen[row, listed[listed >= 0]] = True
    mask = seen.repeat_interleave(32, 0).repeat_interleave(32, 1)[:150, :150] & causal(150, 150)
    expected, _ = attention(q, k, v, mask[None, None], scale=0.1, sigmoid=True)
    close(out, expected, tolerance)


@on_tiles
@of_both
@pytest.mark.usefixtures("target")
def test_tiles_keep_nan_in_place_and_large_scores_apart(dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, HEADS, 150, 64, dtype=dtype) for _ in range(3))
    k[0, 1, 100, 5] = torch.nan
    v[0, 2, 70, :] = torch.nan
    q[0, 3, 20, 0] = torch.nan
    out, _ = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    expected = torch.zeros(HEADS, 150, dtype=torch.bool)
    expected[1, 100:] = expected[2, 70:] = expected[3, 20] = True
    assert torch.equal(out.isnan().any(-1)[0], expected)
    q, k = (torch.randint(-8, 9, (1, HEADS, 200, 64)).to(dtype) * 12 for _ in range(2))
    v = torch.randn(1, HEADS, 200, 64, dtype=dtype)
    assert (q.float() @ k.float().mT * 0.125).abs().max() > 1e4
    x = [t.double() for t in (q, k, v)]
    out, lse = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    close(out, scaled_dot_product_attention(*x, is_causal=True), TOLERANCE[dtype])
    close(lse, attention(*x, causal(200, 200)[None, None], scale=0.125)[1], 1e-5)


@on_tiles
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dim", [16, 96, 256])
def test_float32_on_tiles_is_as_exact_as_stock_attention(dim):
    """Against float64, with an error of the size of the library's own; the kernel is the tiled."""
    torch.manual_seed(dim)
    spec = BlockSparse(dim, dim, dim**-0.5)
    q, k, v = (torch.randn(1, HEADS, 257, dim) for _ in range(3))
    x = BlockSparseInputs(q, k, v)
    chosen = cpu._split(spec, x, "forward")
    assert chosen is not None and chosen[0].packing == "tiles"
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    stock = scaled_dot_product_attention(q, k, v, is_causal=True)
    out, _ = cpu.forward(spec, x)
    assert (out - exact).abs().max() <= 1.5 * (stock - exact).abs().max()


@on_tiles
@pytest.mark.usefixtures("target")
def test_infinities_on_tiles_are_those_of_stock_attention():
    """An infinity has no second part: keys of weight 0, values of one sign, a soft cap.

    Rows from 40 on see all of them; stock attention makes NaN of a hidden infinite value.
    """
    torch.manual_seed(4)
    q, k, v = (torch.rand(1, HEADS, 150, 64) + 0.5 for _ in range(3))
    q[:, :, ::2] = 1.0  # exact in one part, so the others are 0
    k[0, 1, 40, 7] = -torch.inf
    v[0, 2, 33, :8] = torch.inf
    v[0, 3, 20] = 3.4e38
    mask = causal(150, 150)
    out, _ = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    expected = scaled_dot_product_attention(q, k, v, mask)
    assert not expected[:, :, 40:].isnan().any() and expected[0, 3].isfinite().all()
    torch.testing.assert_close(out[:, :, 40:], expected[:, :, 40:], rtol=1e-5, atol=1e-5)
    assert out[0, 2, :33].isfinite().all() and out[0, 3, :20].isfinite().all()
    capped = BlockSparse(64, 64, 0.125, softcap=3.0)
    q[0, 0, 9, 3] = torch.inf
    out, _ = cpu.forward(capped, BlockSparseInputs(q, k, v))
    x = (q.double(), k.double(), v.double())
    expected = attention(*x, mask[None, None], scale=0.125, softcap=3.0)[0]
    expected = expected.to(out.dtype)
    torch.testing.assert_close(out[0, :2], expected[0, :2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0, 2, 40:], expected[0, 2, 40:], rtol=1e-5, atol=1e-5)


@on_tiles
@pytest.mark.usefixtures("target")
def test_gradients_on_tiles_are_as_exact_as_on_vectors():
    torch.manual_seed(6)
    q, k, v, grad = (torch.randn(1, HEADS, 333, 64) for _ in range(4))
    x = BlockSparseInputs(q, k, v)
    out, lse = cpu.forward(DENSE, x)
    tiles = cpu._split(DENSE, x, "backward")
    assert tiles is not None and tiles[0].packing == "gradient tiles"
    y = double({"q": q, "k": k, "v": v})
    whole = scaled_dot_product_attention(y["q"], y["k"], y["v"], is_causal=True)
    exact = torch.autograd.grad(whole, list(y.values()), grad.double())
    rows = cpu._backward(DENSE, x, out, lse, grad, *cpu._ready(DENSE, x, "backward"))[0]
    for mine, theirs, true in zip(
        cpu.backward(DENSE, x, out, lse, grad), rows, exact, strict=False
    ):
        assert (mine - true).abs().max() <= 1.5 * (theirs - true).abs().max()


@on_tiles
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_gradients_of_what_is_not_finite_are_those_of_vectors(name, bad):
    torch.manual_seed(7)
    x = {name: torch.randn(1, HEADS, 100, 64) for name in ("q", "k", "v", "grad")}
    x[name][0, 1, 60, 5] = bad
    grad = x.pop("grad")
    inputs = BlockSparseInputs(**x)
    out, lse = cpu.forward(DENSE, inputs)
    kernel, run = cpu._ready(DENSE, inputs, "backward")
    assert kernel.packing == "rows"
    expected = cpu._backward(DENSE, inputs, out, lse, grad, kernel, run)[0]
    for mine, other in zip(cpu.backward(DENSE, inputs, out, lse, grad), expected, strict=True):
        if mine is not None:
            assert torch.equal(mine.isnan(), other.isnan())
            torch.testing.assert_close(mine[:, 0], other[:, 0])


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
