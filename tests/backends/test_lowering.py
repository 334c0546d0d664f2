"""Windows and the joint form on generated kernels: the reference's outputs and states."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.backends import lowering
from rewriter.backends.generated import kernel, refusal
from rewriter.backends.reference.joint import joint_window_linear
from rewriter.backends.reference.window import window_attention
from rewriter.ir.kernels import JointWindowLinear, WindowAttention, state_of
from rewriter.ir.state import BATCH, KEY_DIM, KV_HEADS, VALUE_DIM, State

B, H, HKV, DK, DV, M = 2, 4, 2, 16, 12, 8
WINDOWS = [
    WindowAttention(16, 2, True, 0.25),
    WindowAttention(5, 0, False, 0.25, softcap=4.0),
    WindowAttention(16, 3, True, 0.25, limit=24),
]
JOINT = JointWindowLinear(16, 2, 0.25, M)


def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    shapes = ((B, H, n, DK), (B, HKV, n, DK), (B, HKV, n, DV))
    q, k, v = (torch.randn(s, generator=g) for s in shapes)
    return q, k, v


def empty_state(spec: Any) -> State:
    sizes = {BATCH: B, KV_HEADS: HKV, KEY_DIM: DK, VALUE_DIM: DV}
    out: State = {}
    for t in state_of(spec).tensors:
        shape = [int(s.subs(sizes)) if hasattr(s, "subs") else int(s) for s in t.shape]
        dtype = torch.float32 if t.dtype == "model" else getattr(torch, t.dtype)
        out[t.name] = torch.full(shape, t.fill, dtype=dtype)
    return out


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(lowering, "window_attention", fail)
    monkeypatch.setattr(lowering, "joint_window_linear", fail)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("spec", WINDOWS)
@pytest.mark.parametrize("n", [2, 17, 70])
def test_windows(spec: WindowAttention, n: int) -> None:
    q, k, v = draw(n)
    out, after = kernel("cpu", spec)(q, k, v)
    torch.testing.assert_close(out, window_attention(spec, q, k, v)[0], rtol=1e-5, atol=1e-5)
    assert after is None
    if spec.causal:
        same(kernel("cpu", spec), window_attention, spec, (q, k, v))


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("n", [17, 70])
@pytest.mark.parametrize("factors", [(), (2, M - 2)])
def test_joint(n: int, factors: tuple[int, ...]) -> None:
    spec = replace(JOINT, factors=factors, features=math.prod(factors) if factors else M)
    q, k, v = draw(n)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(DK, M, generator=g)
    fq, ratio = torch.rand(B, H, n, M, generator=g), torch.rand(H, generator=g)

    def features(x: Tensor) -> Tensor:
        return (x @ weight).softmax(-1)

    args = (q, k, v, fq, features, ratio)
    out, _ = kernel("cpu", spec)(*args)
    torch.testing.assert_close(out, joint_window_linear(spec, *args)[0], rtol=1e-5, atol=1e-5)
    same(kernel("cpu", spec), joint_window_linear, spec, args)


GRADIENTS = {
    "plain": (JOINT, 70),
    "soft cap, no sinks": (replace(JOINT, sinks=0, softcap=3.0), 33),
    "the query alone is near": (replace(JOINT, window=1), 20),
    "one key is far": (replace(JOINT, window=16), 17),
    "features in two factors": (replace(JOINT, factors=(2, M - 2), features=2 * (M - 2)), 70),
}


def joint_leaves(n: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, query features, ratios, and the weight of the key features."""
    g = torch.Generator().manual_seed(n)
    rest = (torch.rand(B, H, n, M, generator=g), torch.rand(H, generator=g) * 3)
    weight = torch.randn(DK, M, generator=g)
    return [x.to(dtype).requires_grad_() for x in (*draw(n), *rest, weight)]


def joint_gradients(run: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Output and gradients of all leaves, under a fixed probe."""
    *args, ratio, weight = leaves
    out = run(*args, lambda x: (x.to(weight.dtype) @ weight).softmax(-1), ratio)[0]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return (out.detach(), *torch.autograd.grad((out * probe).sum(), leaves))


@pytest.mark.parametrize("case", GRADIENTS)
def test_joint_gradients_equal_the_reference_in_float64(
    case: str, request: pytest.FixtureRequest
) -> None:
    spec, n = GRADIENTS[case]
    wanted = joint_gradients(
        lambda *args: joint_window_linear(spec, *args), joint_leaves(n, torch.float64)
    )
    request.getfixturevalue("no_reference")
    got = joint_gradients(kernel("cpu", spec), joint_leaves(n, torch.float32))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_joint_gradients_in_bfloat16(request: pytest.FixtureRequest) -> None:
    low = joint_leaves(70, torch.float32)
    low[:3] = [x.detach().bfloat16().requires_grad_() for x in low[:3]]
    exact = [x.detach().double().requires_grad_() for x in low]
    wanted = joint_gradients(lambda *args: joint_window_linear(JOINT, *args), exact)
    request.getfixturevalue("no_reference")
    got = joint_gradients(kernel("cpu", JOINT), low)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.double() - theirs).norm() < 0.03 * theirs.norm()


def test_the_reference_of_the_joint_form_passes_gradcheck() -> None:
    spec = replace(JOINT, window=3, features=3)
    g = torch.Generator().manual_seed(2)
    shapes = ((1, 2, 7, 4), (1, 1, 7, 4), (1, 1, 7, 2), (1, 2, 7, 3), (2,), (4, 3))
    leaves = [torch.rand(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

    def run(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
        return joint_window_linear(spec, q, k, v, fq, lambda x: (x @ weight).softmax(-1), ratio)[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.usefixtures("no_reference")
def test_joint_with_frozen_inputs_trains_its_maps() -> None:
    """Layer by layer only the features and ratios learn: the near part has no backward to run."""
    leaves = joint_leaves(70, torch.float32)
    whole = joint_gradients(kernel("cpu", JOINT), leaves)[4:]
    for x in leaves[:3]:
        x.requires_grad_(False)
    *args, ratio, weight = leaves
    out = kernel("cpu", JOINT)(*args, lambda x: (x @ weight).softmax(-1), ratio)[0]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad((out * probe).sum(), leaves[3:])
    for ours, theirs in zip(grads, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_watched_joint_calls_are_the_reference() -> None:
    """Padding with gradients and mapped calls: what no generated code serves."""
    leaves = joint_leaves(40, torch.float32)
    valid = torch.ones(B, 40, dtype=torch.bool)
    valid[1, :9] = False

    def padded(run: Any) -> tuple[Tensor, ...]:
        return joint_gradients(lambda *args: run(*args, valid=valid), leaves)

    pairs = zip(
        padded(kernel("cpu", JOINT)),
        padded(lambda *args, **rest: joint_window_linear(JOINT, *args, **rest)),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    *args, ratio, weight = (x.detach() for x in leaves)

    def one(*args: Tensor) -> Tensor:
        batch = (x[None] for x in args)
        out: Tensor = kernel("cpu", JOINT)(*batch, lambda x: (x @ weight).softmax(-1), ratio)[0]
        return out[0]

    expected = kernel("cpu", JOINT)(*args, lambda x: (x @ weight).softmax(-1), ratio)[0]
    torch.testing.assert_close(torch.func.vmap(one)(*args), expected, rtol=1e-5, atol=1e-5)


def same(run: Any, reference: Any, spec: Any, args: tuple[Any, ...]) -> None:
    """Outputs and every tensor of the state, from an empty one."""
    got, after = run(*args, state=empty_state(spec))
    expected, wanted = reference(spec, *args, state=empty_state(spec))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert set(after) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)


def test_what_runs_on_the_reference_is_the_reference() -> None:
    """Padding, a state that has seen tokens, single tokens: bit for bit."""
    spec = WINDOWS[0]
    q, k, v = draw(20)
    valid = torch.ones(B, 20, dtype=torch.bool)
    valid[0, :5] = False
    run = kernel("cpu", spec)
    padded = run(q, k, v, valid=valid)[0]
    assert torch.equal(padded, window_attention(spec, q, k, v, valid=valid)[0])
    _, state = window_attention(spec, q, k, v, state=empty_state(spec))
    for n in (1, 3):
        more = draw(n)
        later = run(*more, state=state)[0]
        assert torch.equal(later, window_attention(spec, *more, state=state)[0])


def test_refusals_say_why() -> None:
    hidden = WindowAttention(4, 1, True, 1.0, hidden=frozenset({"sinks"}))
    assert "switched off" in (refusal("cpu", hidden, torch.float32, False) or "")
    assert "switched off" in (
        refusal("cpu", replace(JOINT, hidden=frozenset({"linear"})), torch.float32, True) or ""
    )
    assert "no kernel" in (refusal("triton", JOINT, torch.float32, False) or "")
