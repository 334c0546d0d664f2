"""WindowAttention against a row loop, SDPA, and its own streaming form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, cases, in_pieces, make, start_state
from kernel_oracles import window_rows
from torch import Tensor

from rewriter.backends.reference.window import window_attention
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.mask import Causal, Mask, SymmetricWindow, WindowOrSinks
from rewriter.ir.state import State

SCALE = 0.6


def run(spec: WindowAttention, c: Case, **kw: Tensor | None) -> Tensor:
    return window_attention(spec, c.q, c.k, c.v, valid=c.valid, **kw)[0]  # type: ignore[arg-type]


def stream(spec: WindowAttention, c: Case, bias: Tensor | None = None) -> tuple[Tensor, State]:
    def call(at: slice, state: State) -> tuple[Tensor, State]:
        rows = bias
        if rows is not None:
            rows = rows[..., : at.stop] if rows.shape[-2] == 1 else rows[..., at, : at.stop]
        out, after = window_attention(
            spec,
            c.q[:, :, at],
            c.k[:, :, at],
            c.v[:, :, at],
            valid=c.valid[:, at],
            bias=rows,
            state=state,
        )
        assert after is not None
        return out, after

    return in_pieces(call, start_state(spec, c), c.pieces)


@settings(max_examples=60, deadline=None)
@given(
    cases(),
    st.integers(1, 24),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([None, 2.0]),
    st.sampled_from([None, 3, 9]),
)
def test_equals_row_loop_and_streams(
    c: Case, window: int, sinks: int, causal: bool, cap: float | None, limit: int | None
) -> None:
    spec = WindowAttention(window, sinks, causal, SCALE, cap, limit)
    expected = window_rows(
        c.q,
        c.k,
        c.v,
        c.valid,
        window=window,
        sinks=sinks,
        causal=causal,
        scale=SCALE,
        cap=cap,
        limit=limit,
    )
    out = run(spec, c)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    if causal:
        torch.testing.assert_close(stream(spec, c)[0], out, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 24), st.integers(0, 4), st.booleans(), st.data())
def test_bias_by_absolute_position(
    c: Case, window: int, sinks: int, causal: bool, data: st.DataObject
) -> None:
    shape = [
        data.draw(st.sampled_from([1, c.q.shape[0]])),
        data.draw(st.sampled_from([1, c.q.shape[1]])),
        data.draw(st.sampled_from([1, c.n])),
        c.n,
    ]
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spec = WindowAttention(window, sinks, causal, SCALE)
    expected = window_rows(
        c.q,
        c.k,
        c.v,
        c.valid,
        window=window,
        sinks=sinks,
        causal=causal,
        scale=SCALE,
        bias=bias,
    )
    torch.testing.assert_close(run(spec, c, bias=bias).double(), expected, atol=1e-5, rtol=1e-5)
    if causal:
        out = stream(spec, c, bias)[0]
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(16, 4), (100, 0), (130, 7), (400, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_equal_sdpa(window: int, sinks: int, causal: bool) -> None:
    """Several blocks whose size does not divide the length; the mask comes from the predicate."""
    c = make(n=333, width=8, value_width=8)
    at = torch.arange(c.n)
    if causal:
        allow = Mask((Causal(), WindowOrSinks(window, sinks))).dense(at, at)
    else:
        allow = Mask((SymmetricWindow(window - 1),)).dense(at, at) | (at < sinks)
    k, v = c.k.repeat_interleave(2, 1), c.v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(c.q, k, v, attn_mask=allow, scale=SCALE)
    spec = WindowAttention(window, sinks, causal, SCALE)
    torch.testing.assert_close(run(spec, c), expected, atol=1e-5, rtol=1e-5)
    if causal:
        pieces = Case(c.q, c.k, c.v, c.valid, (150, 1, 1, 1, 80, 100))
        torch.testing.assert_close(stream(spec, pieces)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hidden", ["sinks", "window"])
def test_hidden_parts(causal: bool, hidden: str) -> None:
    c = make(n=20)
    at = torch.arange(c.n)
    distance = at[:, None] - at
    allow = (distance if causal else distance.abs()) < 5
    if hidden == "window":
        allow = (at < 3).expand(c.n, c.n)
    if causal:
        allow = allow & (distance >= 0)
    k, v = c.k.repeat_interleave(2, 1), c.v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(c.q, k, v, attn_mask=allow, scale=SCALE)
    spec = WindowAttention(5, 3, causal, SCALE, hidden=frozenset({hidden}))
    torch.testing.assert_close(run(spec, c), expected, atol=1e-5, rtol=1e-5)
    if causal:
        pieces = Case(c.q, c.k, c.v, c.valid, (7, 1, 1, 11))
        torch.testing.assert_close(stream(spec, pieces)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_dense_autograd(causal: bool) -> None:
    c = make(n=40)
    c.valid[0, :6] = False
    c.valid[1, 30:] = False
    at = torch.arange(c.n)
    rank = c.valid.long().cumsum(-1) - 1
    distance = at[:, None] - at
    near = ((distance if causal else distance.abs()) < 7)[None] | (rank < 3)[:, None]
    near = near & c.valid[:, None] & ((distance >= 0) if causal else True)
    dense = [x.double().requires_grad_() for x in (c.q, c.k, c.v)]
    scores = dense[0] @ dense[1].repeat_interleave(2, 1).transpose(-1, -2) * SCALE
    scores = scores.masked_fill(~near[:, None], -1e30)
    weight = scores.softmax(-1) * near.any(-1)[:, None, :, None]
    probe = torch.randn((*weight.shape[:-1], 3), generator=torch.Generator().manual_seed(3))
    ((weight @ dense[2].repeat_interleave(2, 1)) * probe).sum().backward()
    ours = [x.clone().requires_grad_() for x in (c.q, c.k, c.v)]
    spec = WindowAttention(7, 3, causal, SCALE)
    out = window_attention(spec, *ours, valid=c.valid)[0]
    (out * probe).sum().backward()
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


def test_fully_masked_rows_are_zero_with_finite_gradients() -> None:
    c = make(n=9)
    c.valid[0] = False
    ours = [x.clone().requires_grad_() for x in (c.q, c.k, c.v)]
    for causal in (True, False):
        out = window_attention(WindowAttention(4, 2, causal, SCALE), *ours, valid=c.valid)[0]
        assert bool((out[0] == 0).all())
        out.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in ours)
    single = Case(c.q, c.k, c.v, c.valid, (1,) * 9)
    assert bool((stream(WindowAttention(4, 2, True, SCALE), single)[0][0] == 0).all())


def test_state_stays_bounded() -> None:
    spec = WindowAttention(8, 3, True, SCALE)
    c = make(n=200)
    for pieces in [(200,), (40,) * 5, (1,) * 200]:
        _, state = stream(spec, Case(c.q, c.k, c.v, c.valid, pieces))
        fresh = start_state(spec, c)
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in fresh.items()}
        held = sum(t.untyped_storage().nbytes() for t in state.values())
        assert held <= 4 * sum(t.untyped_storage().nbytes() for t in fresh.values())
        assert state["sink_at"].tolist() == [[0, 1, 2]] * 2
        assert state["seen"].tolist() == [200, 200]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    c = make(n=70, width=16, value_width=16)
    low = Case(c.q.to(dtype), c.k.to(dtype), c.v.to(dtype), c.valid, (70,))
    spec = WindowAttention(20, 4, True, SCALE)
    out = run(spec, low)
    assert out.dtype == dtype
    exact = run(spec, Case(low.q.float(), low.k.float(), low.v.float(), c.valid, (70,)))
    torch.testing.assert_close(out, exact.to(dtype), atol=0, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(spec, c), run(spec, c), atol=0, rtol=0)
        assert run(spec, c).dtype == torch.float32
