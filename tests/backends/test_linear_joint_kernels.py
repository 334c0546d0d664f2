"""Linear attention and JointWindowLinear against row loops in float64 and their streaming forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, cases, in_pieces, make, start_state
from kernel_oracles import joint_rows, linear_rows
from torch import Tensor

from rewriter.backends.reference.joint import joint_window_linear
from rewriter.backends.reference.recurrence.kernel import recurrence
from rewriter.ir.kernels import JointWindowLinear
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import State

SCALE = 0.6
FEATURES = 5


def features(x: Tensor) -> Tensor:
    """Some positive map, the same for all heads."""
    w = torch.randn(x.shape[-1], FEATURES, generator=torch.Generator().manual_seed(5))
    return F.softplus(x @ w.to(x.dtype))


def linear_spec(c: Case, causal: bool) -> Recurrence:
    return Recurrence(FEATURES, c.v.shape[-1], normaliser="ones", causal=causal)


def linear(c: Case, causal: bool) -> Tensor:
    spec = linear_spec(c, causal)
    return recurrence(spec, features(c.q), features(c.k), c.v, valid=c.valid)[0]


def linear_stream(c: Case) -> tuple[Tensor, State]:
    spec = linear_spec(c, True)

    def call(at: slice, state: State) -> tuple[Tensor, State]:
        fq, fk, v = features(c.q[:, :, at]), features(c.k[:, :, at]), c.v[:, :, at]
        out, after = recurrence(spec, fq, fk, v, valid=c.valid[:, at], state=state)
        assert after is not None
        return out, after

    return in_pieces(call, start_state(spec, c), c.pieces)


def ratios(c: Case) -> Tensor:
    return torch.linspace(0.1, 2.0, c.q.shape[1])


def joint(c: Case, spec: JointWindowLinear, ratio: Tensor | None = None) -> Tensor:
    ratio = ratios(c) if ratio is None else ratio
    return joint_window_linear(spec, c.q, c.k, c.v, features(c.q), features, ratio, valid=c.valid)[
        0
    ]


def joint_stream(c: Case, spec: JointWindowLinear) -> tuple[Tensor, State]:
    def call(at: slice, state: State) -> tuple[Tensor, State]:
        q, k, v = c.q[:, :, at], c.k[:, :, at], c.v[:, :, at]
        out, after = joint_window_linear(
            spec, q, k, v, features(q), features, ratios(c), valid=c.valid[:, at], state=state
        )
        assert after is not None
        return out, after

    return in_pieces(call, start_state(spec, c), c.pieces)


@settings(max_examples=50, deadline=None)
@given(cases(), st.booleans())
def test_linear_equals_token_recurrence(c: Case, causal: bool) -> None:
    out = linear(c, causal)
    expected = linear_rows(features(c.q), features(c.k), c.v, c.valid, causal=causal)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    if causal:
        torch.testing.assert_close(linear_stream(c)[0], out, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    cases(),
    st.integers(1, 24),
    st.integers(0, 4),
    st.sampled_from([None, 2.0]),
    st.sampled_from([frozenset[str](), frozenset({"window"}), frozenset({"linear"})]),
)
def test_joint_equals_row_loop_and_streams(
    c: Case, window: int, sinks: int, cap: float | None, hidden: frozenset[str]
) -> None:
    spec = JointWindowLinear(window, sinks, SCALE, FEATURES, cap, hidden)
    expected = joint_rows(
        c.q,
        c.k,
        c.v,
        features(c.q),
        features(c.k),
        ratios(c),
        c.valid,
        window=window,
        sinks=sinks,
        scale=SCALE,
        cap=cap,
        hidden=hidden,
    )
    out = joint(c, spec)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joint_stream(c, spec)[0], out, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 24), st.integers(0, 4), st.sampled_from([(2, 3), (5, 1), (1, 2, 2)]))
def test_features_in_factors_equal_their_outer_product(
    c: Case, window: int, sinks: int, factors: tuple[int, ...]
) -> None:
    """By pairs within a stretch and by the state across; the oracle sees the wide features."""
    width = math.prod(factors)
    spec = JointWindowLinear(window, sinks, SCALE, width, factors=factors)

    def parts(x: Tensor) -> Tensor:
        w = torch.randn(x.shape[-1], sum(factors), generator=torch.Generator().manual_seed(5))
        return F.softplus(x @ w.to(x.dtype))

    def run(at: slice, state: State | None) -> tuple[Tensor, State | None]:
        q, k, v = c.q[:, :, at], c.k[:, :, at], c.v[:, :, at]
        return joint_window_linear(
            spec, q, k, v, parts(q), parts, ratios(c), valid=c.valid[:, at], state=state
        )

    def streamed(at: slice, state: State) -> tuple[Tensor, State]:
        out, after = run(at, state)
        assert after is not None
        return out, after

    fq, fk = (_outer(parts(x), factors) for x in (c.q, c.k))
    expected = joint_rows(
        c.q, c.k, c.v, fq, fk, ratios(c), c.valid, window=window, sinks=sinks, scale=SCALE
    )
    out = run(slice(None), None)[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    out = in_pieces(streamed, start_state(spec, c), c.pieces)[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def _outer(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Row by row with `torch.kron`."""
    rows = []
    for row in x.flatten(0, -2):
        wide = torch.ones(1)
        for part in row.split(factors):
            wide = torch.kron(wide, part)
        rows.append(wide)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def test_long_sequences_cross_many_chunks() -> None:
    c = make(n=150)
    c.valid[0, :13] = False
    spec = JointWindowLinear(30, 3, SCALE, FEATURES)
    fq, fk = features(c.q), features(c.k)
    expected = linear_rows(fq, fk, c.v, c.valid, causal=True)
    torch.testing.assert_close(linear(c, True).double(), expected, atol=1e-5, rtol=1e-5)
    expected = joint_rows(
        c.q, c.k, c.v, fq, fk, ratios(c), c.valid, window=30, sinks=3, scale=SCALE
    )
    torch.testing.assert_close(joint(c, spec).double(), expected, atol=1e-5, rtol=1e-5)
    for pieces in [(150,), (70, 1, 1, 78), (1,) * 150]:
        split = Case(c.q, c.k, c.v, c.valid, pieces)
        torch.testing.assert_close(linear_stream(split)[0], linear(c, True), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            joint_stream(split, spec)[0].double(), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("ratio", [1e-4, 1.0, 1e4])
def test_joint_with_a_window_over_everything_is_softmax(ratio: float) -> None:
    c = make(n=30)
    k, v = c.k.repeat_interleave(2, 1), c.v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(c.q, k, v, is_causal=True, scale=SCALE)
    for window in (30, 64):
        out = joint(c, JointWindowLinear(window, 4, SCALE, FEATURES), torch.full((4,), ratio))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_joint_gradients_equal_dense_autograd() -> None:
    c = make(n=40)
    c.valid[0, :6] = False
    window, sinks = 7, 3
    at = torch.arange(c.n)
    distance = at[:, None] - at
    rank = c.valid.long().cumsum(-1) - 1
    seen = (c.valid[:, None] & (distance >= 0))[:, None]
    near = seen & ((distance < window) | (rank < sinks)[:, None, None, :])
    dense = [x.double().requires_grad_() for x in (c.q, c.k, c.v)]
    theirs = ratios(c).double().requires_grad_()
    keys = dense[1].repeat_interleave(2, 1)
    s = (dense[0] @ keys.transpose(-1, -2) * SCALE).masked_fill(~near, -1e30)
    top = s.amax(-1, keepdim=True)
    far = features(dense[0]) @ features(keys).transpose(-1, -2) * theirs[None, :, None, None]
    weight = (s - top).exp() * near + far * (seen & ~near)
    out = weight @ dense[2].repeat_interleave(2, 1) / weight.sum(-1, keepdim=True).clamp_min(1e-9)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    (out * probe).sum().backward()
    ours = [x.clone().requires_grad_() for x in (c.q, c.k, c.v)]
    ratio = ratios(c).requires_grad_()
    spec = JointWindowLinear(window, sinks, SCALE, FEATURES)
    mine = joint_window_linear(spec, *ours, features(ours[0]), features, ratio, valid=c.valid)[0]
    (mine * probe).sum().backward()
    for a, b in zip([*ours, ratio], [*dense, theirs], strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_the_state() -> None:
    """A sequence in pieces has the gradients of the whole."""
    spec = JointWindowLinear(5, 2, SCALE, FEATURES)
    grads = []
    for pieces in [(24,), (9, 1, 1, 13)]:
        c = make(n=24)
        leaves = [x.requires_grad_() for x in (c.q, c.k, c.v)]
        out, _ = joint_stream(Case(c.q, c.k, c.v, c.valid, pieces), spec)
        out.square().sum().backward()
        grads.append([x.grad for x in leaves])
    for whole, split in zip(*grads, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def test_fully_masked_rows_are_zero_with_finite_gradients() -> None:
    c = make(n=12)
    c.valid[0] = False
    leaves = [x.requires_grad_() for x in (c.q, c.k, c.v)]
    spec = JointWindowLinear(4, 2, SCALE, FEATURES)
    outs = [joint(c, spec), linear(c, True), linear(c, False), joint_stream(c, spec)[0]]
    for out in outs:
        assert bool((out[0] == 0).all())
    torch.stack([out.square().sum() for out in outs]).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves if x.grad is not None)


def test_state_is_bounded_and_float32() -> None:
    spec = JointWindowLinear(8, 3, SCALE, FEATURES)
    c = make(n=120)
    low = Case(c.q.bfloat16(), c.k.bfloat16(), c.v.bfloat16(), c.valid, (60, 1, 1, 58))
    state = start_state(spec, low, torch.bfloat16)

    def call(at: slice, state: State) -> tuple[Tensor, State]:
        q, k, v = low.q[:, :, at], low.k[:, :, at], low.v[:, :, at]
        out, after = joint_window_linear(
            spec, q, k, v, features(q), features, ratios(c), state=state
        )
        assert after is not None
        return out, after

    out, after = in_pieces(call, state, low.pieces)
    assert out.dtype == torch.bfloat16
    assert after["far"].dtype == torch.float32
    assert after["ring_k"].dtype == torch.bfloat16
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in state.items()}
    assert after["far"].untyped_storage().nbytes() == state["far"].untyped_storage().nbytes()
    # The normaliser counts every far key: 120 tokens less 3 sinks less the 7 in the ring.
    ones = joint_stream(Case(c.q, c.k * 0, c.v, c.valid, (120,)), spec)[1]
    count = ones["far"][..., -1] / features(torch.zeros(1, 4))
    torch.testing.assert_close(count, torch.full_like(count, 110.0))


def test_autocast_does_not_reach_the_state() -> None:
    c = make(n=30)
    spec = JointWindowLinear(5, 2, SCALE, FEATURES)
    plain, state = joint_stream(c, spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fq = features(c.q).float()
        out, after = joint_window_linear(
            spec, c.q, c.k, c.v, fq, features, ratios(c), state=start_state(spec, c)
        )
    assert after is not None
    assert after["far"].dtype == torch.float32
    torch.testing.assert_close(after["ring_k"], state["ring_k"], atol=0, rtol=0)
    torch.testing.assert_close(out, plain, atol=0.05, rtol=0.05)  # the map alone ran in bfloat16
