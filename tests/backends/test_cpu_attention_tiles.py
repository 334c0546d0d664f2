"""Generated block-sparse attention on tile registers, in bfloat16 and in three parts of float32."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    DENSE,
    EVERY,
    HEADS,
    HOOKS,
    LISTED,
    causal,
    double,
    drawn,
    mixed,
    qkv,
    run,
    sizes,
)
from attention_cases import target as target
from attention_oracles import attention, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from rewriter.backends.cpu import block_sparse as cpu
from rewriter.backends.inputs import BlockSparseInputs
from rewriter.ir.block_sparse import BlockSparse

on_tiles = pytest.mark.parametrize("target", ["tiles"], indirect=True)
of_both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


@on_tiles
@of_both
@pytest.mark.usefixtures("target")
@settings(max_examples=25, **drawn)
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
    if dtype == torch.float32:  # a NaN that rounding to bfloat16 would make -0
        v[0, 2, 70] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
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
@pytest.mark.parametrize(("dim", "n"), [(16, 257), (96, 257), (256, 257), (16, 1500), (64, 900)])
def test_float32_on_tiles_is_as_exact_as_stock_attention(dim, n):
    """Against float64, with an error of the size of the library's own; the kernel is the tiled.

    Weights of long rows have fewer parts.
    """
    torch.manual_seed(dim)
    spec = BlockSparse(dim, dim, dim**-0.5)
    q, k, v = (torch.randn(1, HEADS, n, dim) for _ in range(3))
    x = BlockSparseInputs(q, k, v)
    chosen = cpu._split(spec, x, "forward")
    assert chosen is not None and chosen[0].packing == "tiles"
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    stock = scaled_dot_product_attention(q, k, v, is_causal=True)
    out, _ = cpu.forward(spec, x)
    assert (out - exact).abs().max() <= 1.5 * (stock - exact).abs().max()


@on_tiles
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("sharpness", [0.0, 0.01, 2.0, 8.0])
def test_weights_of_fewer_parts_are_close(sharpness):
    """Flat rows and peaked ones, values far from 0 or all the same: 2e-6 of the largest output."""
    torch.manual_seed(11)
    q, k, v = (torch.randn(1, HEADS, 700, 64) for _ in range(3))
    q *= sharpness
    v[:, 1] += 3.0
    v[:, 2] = 0.7
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    out, _ = cpu.forward(DENSE, BlockSparseInputs(q, k, v))
    most = exact.abs().amax((0, 2, 3))
    assert ((out - exact).abs().amax((0, 2, 3)) <= 2e-6 * most).all()


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
@of_both
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("spec", [DENSE, BlockSparse(96, 96, 0.17)])
def test_gradients_on_tiles_are_as_exact_as_others(spec, dtype):
    """float32 as those on vectors; bfloat16, with rounded weights, as those of stock attention."""
    torch.manual_seed(6)
    q, k = (torch.randn(1, HEADS, 333, spec.key_dim).to(dtype) for _ in range(2))
    v, grad = (torch.randn(1, HEADS, 333, spec.value_dim).to(dtype) for _ in range(2))
    x = BlockSparseInputs(q, k, v)
    out, lse = cpu.forward(spec, x)
    tiles = cpu._split(spec, x, "backward")
    assert tiles is not None and tiles[0].packing == "gradient tiles"

    def stock(*y):
        y = [t.detach().clone().requires_grad_() for t in y]
        whole = scaled_dot_product_attention(*y, is_causal=True, scale=spec.scale)
        return torch.autograd.grad(whole, y, grad.to(whole.dtype))

    exact, other = stock(q.double(), k.double(), v.double()), stock(q, k, v)
    if dtype == torch.float32:
        other = cpu._backward(spec, x, out, lse, grad, *cpu._ready(spec, x, "backward"))[0]
    for mine, theirs, true in zip(
        cpu.backward(spec, x, out, lse, grad), other, exact, strict=False
    ):
        assert (mine - true).abs().max() <= 1.5 * (theirs - true).abs().max()


@on_tiles
@pytest.mark.usefixtures("target")
def test_bfloat16_gradients_on_tiles_through_every_hook():
    torch.manual_seed(9)
    q, k, v = qkv(EVERY, 2, 2, 130, 161, torch.bfloat16)
    x = {"q": q, "k": k, "v": v, "sinks": torch.randn(HEADS), "slopes": torch.rand(HEADS) * 0.2}
    x |= {"bias": torch.randn(1, HEADS, 130, 161), "temperature": torch.rand(HEADS, 130) + 0.5}
    grad = torch.randn(2, HEADS, 130, 40).to(torch.bfloat16)
    _, _, grads = run(EVERY, x, grad)
    y = double(x)
    expected, _ = attention(
        *(y["q"], y["k"], y["v"], mixed(130, 161, 3)[None]),
        **{"scale": 0.2, "softcap": 5.0, "offset": 3, **{name: y[name] for name in HOOKS}},
    )
    exact = torch.autograd.grad(expected, list(y.values()), grad.double())
    for name, true in zip(y, exact, strict=True):
        close(getattr(grads, name), true, 2e-2)


@on_tiles
@of_both
@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_gradients_of_what_is_not_finite_are_those_of_vectors(name, bad, dtype):
    torch.manual_seed(7)
    x = {name: torch.randn(1, HEADS, 100, 64).to(dtype) for name in ("q", "k", "v", "grad")}
    x[name][0, 1, 60, 5] = bad
    grad = x.pop("grad")
    inputs = BlockSparseInputs(**x)
    out, lse = cpu.forward(DENSE, inputs)
    kernel, function = cpu._ready(DENSE, inputs, "backward")
    assert kernel.packing == "rows"
    expected = cpu._backward(DENSE, inputs, out, lse, grad, kernel, function)[0]
    for mine, other in zip(cpu.backward(DENSE, inputs, out, lse, grad), expected, strict=True):
        if mine is not None:
            assert torch.equal(mine.isnan(), other.isnan())
            torch.testing.assert_close(mine[:, 0], other[:, 0])
