"""Generated C++ recurrences against the definition in float64 and the reference's gradients.

Every spec costs compilations, so there are few of them; together they cover the decays, the
corrections, the reads, the normaliser, both directions, widths from 16 to 256 and both dtypes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recurrence_cases import Call, call_of
from recurrence_oracles import pairwise, token_loop
from torch import Tensor

from rewriter.backends.cpu import recurrence as cpu
from rewriter.backends.cpu import recurrence_forms as forms
from rewriter.backends.cpu.build import NoKernel, find_compiler
from rewriter.backends.cpu.recurrence_step import fixed_step
from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.reference.recurrence.kernel import recurrence
from rewriter.ir.recurrence import Recurrence

pytestmark = pytest.mark.skipif(
    isinstance(find_compiler(), NoKernel), reason="no C++ compiler on this machine"
)

LINEAR = Recurrence(48, 64, normaliser="ones", scale=0.7)
HEAD = Recurrence(16, 24, decay="head")
TOKEN = Recurrence(16, 16, decay="token", normaliser="ones")
CHANNEL = Recurrence(72, 16, decay="channel", scale=0.5)
BONUS = Recurrence(20, 13, decay="channel", read="exclusive", bonus=True)
DELTA = Recurrence(20, 16, decay="token", correction="delta", scale=0.7)
CHANNEL_DELTA = Recurrence(16, 32, decay="channel", correction="delta")
UNTIED = Recurrence(16, 24, decay="channel", correction="untied")
GLOBAL = Recurrence(256, 80, normaliser="ones", causal=False)
BOTH = Recurrence(16, 23, decay="head", normaliser="ones", causal=False)
CAUSAL = {
    "linear": LINEAR,
    "head": HEAD,
    "channel": CHANNEL,
    "bonus": BONUS,
    "delta": DELTA,
    "untied": UNTIED,
}
TRAINED = {"token": TOKEN, "channel": CHANNEL, "delta": DELTA, "bonus": BONUS, "untied": UNTIED}


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than FEW are chunks here, whatever is faster on this machine."""
    monkeypatch.setattr(cpu, "_steps", lambda *_: forms.FEW)


def inputs(call: Call, cu: Tensor | None = None) -> RecurrenceInputs:
    start = None if call.state is None else call.state["S"].float()
    return RecurrenceInputs(call.q, call.k, call.v, **call.keywords(), cu_seqlens=cu, start=start)


def forward(spec: Recurrence, call: Call, cu: Tensor | None = None) -> tuple[Tensor, Tensor]:
    assert cpu.decline(spec, call.v.dtype, False) is None
    return cpu.forward(spec, inputs(call, cu))


def close(mine: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    """Largest error relative to the largest value."""
    assert mine.shape == theirs.shape
    assert bool(torch.isfinite(mine).all())
    error = float((mine.double() - theirs.double()).abs().max())
    assert error <= bound * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("spec", CAUSAL.values(), ids=CAUSAL)
def test_forward_equals_the_definition(spec: Recurrence) -> None:
    for n, group, state in (
        (1, 1, False),
        (8, 3, True),
        (9, 1, True),
        (33, 2, False),
        (150, 1, True),
    ):
        call = call_of(spec, n, batch=1, group=group, state=state, strength=0.3)
        out, end = forward(spec, call)
        expected, last = token_loop(spec, call)
        close(out, expected)
        close(end, last["S"])


@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 64, 65, 97, 300])
def test_lengths_around_the_chunk(n: int) -> None:
    for spec in (LINEAR, CHANNEL, DELTA):
        call = call_of(spec, n, batch=2, state=True, strength=0.1).double()
        expected, last = recurrence(
            spec, call.q, call.k, call.v, **call.keywords(), state=call.state
        )
        assert last is not None
        out, end = forward(spec, call.to(torch.float32))
        close(out, expected)
        close(end, last["S"])


def test_bidirectional_equals_the_matrix_of_weights() -> None:
    for spec, n in ((GLOBAL, 1), (GLOBAL, 37), (BOTH, 40)):
        call = call_of(spec, n, kv_heads=1)
        close(forward(spec, call)[0], pairwise(spec, call))


def test_states_are_handed_over_at_any_split() -> None:
    for spec in (LINEAR, CHANNEL, DELTA):
        call = call_of(spec, 130, batch=1, state=True, strength=0.2)
        whole, last = forward(spec, call)
        for pieces in ((1, 129), (64, 1, 2, 63), (40, 90)):
            at, outs, state = 0, [], call.state
            for length in pieces:
                out, end = forward(spec, call.part(spec, slice(at, at + length), state))
                outs.append(out)
                state = {"S": end}
                at += length
            close(torch.cat(outs, 2), whole)
            close(end, last)


def test_packed_sequences_equal_separate_ones() -> None:
    starts = [0, 5, 5, 70, 130]
    cu = torch.tensor(starts, dtype=torch.int32)
    for spec in (LINEAR, DELTA, UNTIED):
        call = call_of(spec, 130, batch=1)
        rows = call_of(spec, 1, batch=4, state=True).state
        assert rows is not None
        out, end = forward(spec, replace(call, state=rows), cu)
        for s in (0, 2, 3):
            a, b = starts[s], starts[s + 1]
            part = call.part(spec, slice(a, b), {"S": rows["S"][s : s + 1]})
            alone, last = forward(spec, part)
            close(out[:, :, a:b], alone)
            close(end[s : s + 1], last)
        close(end[1], rows["S"][1])


@pytest.mark.parametrize(
    "spec", [HEAD, CHANNEL, DELTA, BONUS], ids=["head", "channel", "delta", "bonus"]
)
@pytest.mark.parametrize("gates", ["inf", "huge", "zero", "mixed"])
def test_extreme_gates(spec: Recurrence, gates: str) -> None:
    for n in (5, 100):
        call = call_of(spec, n, batch=1, group=1, state=True)
        assert call.decay is not None
        value = {"inf": -torch.inf, "huge": -1e4, "zero": 0.0, "mixed": -torch.inf}[gates]
        steps = torch.full_like(call.decay, value)
        if gates == "mixed":
            coin = torch.rand(steps.shape, generator=torch.Generator().manual_seed(2))
            small = torch.where(coin < 0.2, -1e4, call.decay * 1e-3)
            steps = torch.where(coin < 0.1, value, small)
        call = replace(call, decay=steps)
        out, end = forward(spec, call)
        expected, last = token_loop(spec, call)
        close(out, expected)
        close(end, last["S"])


def test_zero_mass_gives_zero_and_nan_stays_where_it_is() -> None:
    call = call_of(LINEAR, 40, batch=2)
    blank = replace(call, k=call.k * 0)
    assert bool((forward(LINEAR, blank)[0] == 0).all())
    v = call.v.clone()
    v[0, 0, 30] = torch.nan
    out, end = forward(LINEAR, replace(call, v=v))
    assert bool(out[0, :2, 30:].isnan().any()) and bool(end[0, 0].isnan().any())
    assert bool(out[0, 2:].isfinite().all()) and bool(out[1].isfinite().all())


def test_inputs_of_any_strides_and_dtypes() -> None:
    call = call_of(CHANNEL, 50, state=True)
    expected = forward(CHANNEL, call)

    def scattered(t: Tensor) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]

    def swapped(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    assert call.decay is not None
    for change in (scattered, swapped):
        moved = replace(
            call,
            q=change(call.q),
            k=change(call.k),
            v=change(call.v),
            decay=change(call.decay),
        )
        for mine, theirs in zip(forward(CHANNEL, moved), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
        step = moved.part(CHANNEL, slice(0, 3), call.state)
        close(forward(CHANNEL, step)[0], expected[0][:, :, :3])


@pytest.mark.parametrize("spec", [CHANNEL_DELTA, TOKEN], ids=["channel_delta", "token"])
def test_bfloat16(spec: Recurrence) -> None:
    for n in (4, 90):
        call = call_of(spec, n, batch=1, state=True, strength=0.3).to(torch.bfloat16)
        out, end = forward(spec, call)
        assert out.dtype == torch.bfloat16 and end.dtype == torch.float32
        expected, last = token_loop(spec, call)
        close(out, expected, 1e-2)
        close(end, last["S"])


@pytest.mark.parametrize(
    "spec",
    [
        # The backward of an untied correction takes the compiler longest.
        pytest.param(s, id=n, marks=[pytest.mark.nightly] if n == "untied" else [])
        for n, s in TRAINED.items()
    ],
)
@pytest.mark.parametrize("n", [1, 30, 77])
def test_gradients_equal_those_of_the_reference(spec: Recurrence, n: int) -> None:
    assert cpu.decline(spec, torch.float32, True) is None
    call = call_of(spec, n, state=True, strength=0.3)
    assert call.state is not None
    gen = torch.Generator().manual_seed(3)
    grad_out = torch.randn(2, 4, n, spec.value_dim, generator=gen)
    grad_end = torch.randn(call.state["S"].shape, generator=gen)
    mine = cpu.backward(spec, inputs(call), grad_out, grad_end)
    wide = call.double()
    leaves = {**wide.tensors(), **({"start": wide.state["S"]} if wide.state else {})}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, end = recurrence(
        spec, wide.q, wide.k, wide.v, **wide.keywords(), state={"S": leaves["start"]}
    )
    assert end is not None
    ((out * grad_out).sum() + (end["S"] * grad_end).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        close(getattr(mine, name), leaf.grad)
    alone = cpu.backward(spec, replace(inputs(call), start=None), grad_out, None)
    assert alone.start is None and bool(alone.q.isfinite().all())


@pytest.mark.parametrize("spec", [CHANNEL, DELTA], ids=["channel", "delta"])
def test_gradients_at_extreme_gates(spec: Recurrence) -> None:
    call = call_of(spec, 60, batch=1, group=1, strength=0.01)
    assert call.decay is not None
    coin = torch.rand(call.decay.shape, generator=torch.Generator().manual_seed(2))
    steps = torch.where(coin < 0.1, -torch.inf, torch.where(coin < 0.2, -1e4, call.decay))
    call = replace(call, decay=steps)
    grad_out = torch.randn((*call.q.shape[:3], spec.value_dim))
    mine = cpu.backward(spec, inputs(call), grad_out, None)
    wide = call.double()
    for leaf in wide.tensors().values():
        leaf.requires_grad_()
    out, _ = recurrence(spec, wide.q, wide.k, wide.v, **wide.keywords())
    (out * grad_out).sum().backward()
    for name, leaf in wide.tensors().items():
        assert leaf.grad is not None
        close(getattr(mine, name), leaf.grad)


def test_gradients_of_packed_and_bidirectional_calls() -> None:
    cu = torch.tensor([0, 40, 77], dtype=torch.int32)
    for spec, packed in ((TOKEN, cu), (GLOBAL, None), (BOTH, cu)):
        call = call_of(spec, 77, batch=1, kv_heads=1, strength=0.3)
        grad_out = torch.randn(1, 2, 77, spec.value_dim, generator=torch.Generator().manual_seed(1))
        mine = cpu.backward(spec, inputs(call, packed), grad_out, None)
        wide = call.double()
        for leaf in wide.tensors().values():
            leaf.requires_grad_()
        out, _ = recurrence(spec, wide.q, wide.k, wide.v, **wide.keywords(), cu_seqlens=packed)
        (out * grad_out).sum().backward()
        for name, leaf in wide.tensors().items():
            assert leaf.grad is not None
            close(getattr(mine, name), leaf.grad)


def test_a_sequence_split_over_threads_gives_the_same() -> None:
    before = torch.get_num_threads()
    try:
        for spec in (LINEAR, CHANNEL, HEAD):
            call = call_of(spec, 1100, batch=1, kv_heads=1, state=True, strength=0.05)
            torch.set_num_threads(1)
            alone = forward(spec, call)
            for threads in (2, 4):
                torch.set_num_threads(threads)
                for mine, theirs in zip(forward(spec, call), alone, strict=True):
                    close(mine, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gates", ["token", "head", "channel"])
@pytest.mark.parametrize("correction", ["delta", "untied"])
def test_value_columns_shared_by_threads_give_the_same(gates: str, correction: str) -> None:
    spec = Recurrence(20, 64, decay=gates, correction=correction)  # type: ignore[arg-type]
    call = call_of(spec, 300, batch=1, kv_heads=1, state=True, strength=0.05)
    packed = torch.tensor([0, 300], dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = forward(spec, call)
        torch.set_num_threads(2)
        for cu in (None, packed):
            for mine, theirs in zip(forward(spec, call, cu), alone, strict=True):
                close(mine, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("spec", "dtype", "grad", "reason"),
    [
        (LINEAR, torch.float64, False, "takes float32 and bfloat16, not float64"),
        (Recurrence(300, 16), torch.float32, False, "widths up to 256"),
        (Recurrence(16, 16, decay="token", normaliser="max"), torch.float32, False, "max"),
    ],
)
def test_declines_say_why(spec: Recurrence, dtype: torch.dtype, grad: bool, reason: str) -> None:
    said = cpu.decline(spec, dtype, grad)
    assert said is not None and reason in said


@pytest.mark.parametrize("spec", [CHANNEL_DELTA, TOKEN, BONUS, UNTIED], ids=str)
def test_a_fixed_step_updates_its_buffers(spec: Recurrence) -> None:
    call = call_of(spec, 5, batch=2, state=True)
    expected, last = token_loop(spec, call)
    assert call.state is not None
    state = call.state["S"].float().clone()
    out = torch.empty(*call.q.shape[:2], 1, spec.value_dim)
    first = call.part(spec, slice(0, 1), None)
    buffers = {n: t.contiguous().clone() for n, t in first.tensors().items()}
    step = fixed_step(spec, out=out, state=state, **buffers)
    assert not isinstance(step, NoKernel)
    for t in range(5):
        for name, value in call.part(spec, slice(t, t + 1), None).tensors().items():
            buffers[name].copy_(value)
        step()
        close(out, expected[:, :, t : t + 1])
    close(state, last["S"])


def test_a_fixed_step_refuses_what_it_cannot_read() -> None:
    call = call_of(TOKEN, 1, batch=1, state=True)
    assert call.state is not None and call.decay is not None
    state = call.state["S"]
    out = torch.empty(*call.q.shape[:2], 1, TOKEN.value_dim)
    with pytest.raises(ValueError, match="contiguous"):
        wide = torch.zeros(*call.q.shape[:-1], 2 * call.q.shape[-1])[..., ::2]
        fixed_step(TOKEN, wide, call.k, call.v, out, state, decay=call.decay)
    with pytest.raises(ValueError, match="float32"):
        fixed_step(TOKEN, call.q, call.k, call.v, out, state.double(), decay=call.decay)
    with pytest.raises(ValueError, match="state of this step"):
        fixed_step(TOKEN, call.q, call.k, call.v, out, state[:, :, 1:], decay=call.decay)
