"""Windows and the joint form on generated kernels: the reference's outputs and states."""

from __future__ import annotations

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
def test_joint(n: int) -> None:
    q, k, v = draw(n)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(DK, M, generator=g)
    fq, ratio = torch.rand(B, H, n, M, generator=g), torch.rand(H, generator=g)

    def features(x: Tensor) -> Tensor:
        return (x @ weight).softmax(-1)

    args = (q, k, v, fq, features, ratio)
    out, _ = kernel("cpu", JOINT)(*args)
    torch.testing.assert_close(out, joint_window_linear(JOINT, *args)[0], rtol=1e-5, atol=1e-5)
    same(kernel("cpu", JOINT), joint_window_linear, JOINT, args)


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
    assert "backward" in (refusal("cpu", JOINT, torch.float32, True) or "")
    assert "no kernel" in (refusal("triton", JOINT, torch.float32, False) or "")
