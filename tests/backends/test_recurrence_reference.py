"""The reference recurrence against its definition, its own forms and other people's code."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import Call, call_of, specs, zero_state
from recurrence_oracles import pairwise, token_loop
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

from rewriter.backends.reference.recurrence.kernel import recurrence
from rewriter.ir.recurrence import Recurrence

ALL = specs(5, 3)
CAUSAL = [s for s in ALL if s.causal]


def name(spec: Recurrence) -> str:
    parts = [spec.decay, spec.correction, spec.read, spec.normaliser]
    return "-".join([*parts, *(["bonus"] * spec.bonus), *(["both"] * (not spec.causal))])


def some(chosen: list[Recurrence], start: int) -> list[Any]:
    """All variants at night, every third by day: another third in each test."""
    return [
        pytest.param(s, id=name(s), marks=[] if i % 3 == start else [pytest.mark.nightly])
        for i, s in enumerate(chosen)
    ]


def run(spec: Recurrence, call: Call) -> tuple[Tensor, dict[str, Tensor] | None]:
    return recurrence(spec, call.q, call.k, call.v, **call.keywords(), state=call.state)


def close(mine: Tensor, theirs: Tensor, bound: float) -> None:
    """Largest error relative to the largest value."""
    assert mine.shape == theirs.shape
    assert bool(torch.isfinite(mine).all())
    error = (mine.double() - theirs.double()).abs().max() if mine.numel() else torch.zeros(())
    assert float(error) <= bound * max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)


def holes(call: Call) -> Call:
    n = call.q.shape[2]
    valid = torch.ones(call.q.shape[0], n, dtype=torch.bool)
    valid[0, : n // 3] = False
    valid[-1, n // 2 : n // 2 + 3] = False
    return replace(call, valid=valid)


@pytest.mark.parametrize("spec", ALL, ids=name)
def test_every_variant_equals_its_definition(spec: Recurrence) -> None:
    for n, padded, state in ((1, False, True), (3, True, False), (70, True, True)):
        if not spec.causal and n > 40:
            n = 40
        call = call_of(spec, n, state=state and spec.causal)
        call = holes(call) if padded else call
        expected = token_loop(spec, call)[0] if spec.causal else pairwise(spec, call)
        close(run(spec, call.double())[0], expected, 1e-8)
        close(run(spec, call)[0], expected, 1e-4 if spec.normaliser == "max" else 1e-5)


@pytest.mark.parametrize("spec", some(CAUSAL, 0))
def test_states_are_handed_over_at_any_split(spec: Recurrence) -> None:
    call = holes(call_of(spec, 140, batch=1, state=True)).double()
    out, end = run(spec, call)
    expected, last = token_loop(spec, call)
    close(out, expected, 1e-8)
    assert end is not None
    for pieces in ((140,), (1, 69, 1, 1, 68), (5, 135), (0, 64, 76)):
        at, outs, state = 0, [], call.state
        for length in pieces:
            piece, state = run(spec, call.part(spec, slice(at, at + length), state))
            outs.append(piece)
            at += length
        close(torch.cat(outs, 2), expected, 1e-8)
        assert state is not None and state.keys() == last.keys()
        for key, value in state.items():
            close(value, last[key], 1e-8)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CAUSAL), st.integers(1, 300), st.integers(0, 1000), st.sampled_from([1, 3]))
def test_any_length(spec: Recurrence, n: int, seed: int, group: int) -> None:
    call = call_of(spec, n, seed=seed, batch=1, kv_heads=1, group=group).double()
    out, after = run(spec, call)
    assert after is None
    close(out, token_loop(spec, call)[0], 1e-7)


@pytest.mark.parametrize("spec", some([s for s in CAUSAL if s.decay != "none"], 1))
@pytest.mark.parametrize("gates", ["inf", "huge", "zero", "mixed"])
def test_extreme_gates(spec: Recurrence, gates: str) -> None:
    call = call_of(spec, 90, batch=1, kv_heads=2, group=1)
    assert call.decay is not None
    steps = call.decay
    value = {"inf": -torch.inf, "huge": -1e4, "zero": 0.0, "mixed": -torch.inf}[gates]
    if gates == "mixed":
        coin = torch.rand(steps.shape, generator=torch.Generator().manual_seed(2))
        steps = torch.where(coin < 0.1, value, torch.where(coin < 0.2, -1e4, steps * 1e-3))
    else:
        steps = torch.full_like(steps, value)
    call = replace(call, decay=steps, state=zero_state(spec, call))
    given_steps = steps.clone().requires_grad_()
    q = call.q.clone().requires_grad_()
    live = replace(call, decay=given_steps, q=q)
    out, end = run(spec, live)
    close(out.detach(), token_loop(spec, call)[0], 1e-4 if spec.normaliser == "max" else 1e-5)
    assert end is not None
    (out.square().sum() + end["S"].square().sum()).backward()
    assert given_steps.grad is not None and q.grad is not None
    assert bool(given_steps.grad.isfinite().all()) and bool(q.grad.isfinite().all())


@pytest.mark.parametrize("spec", some(ALL, 2))
def test_gradcheck(spec: Recurrence) -> None:
    call = call_of(spec, 6, batch=1, kv_heads=1, state=spec.causal).double()
    names = list(call.tensors())
    states = [] if call.state is None else list(call.state)
    leaves = [call.tensors()[n].requires_grad_() for n in names]
    leaves += [] if call.state is None else [call.state[n].requires_grad_() for n in states]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(states, tensors[len(names) :], strict=True)) if states else None
        given = dict(zip(names, tensors, strict=False))
        out, end = recurrence(spec, **given, state=held)
        return (out, *(end or {}).values())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("spec", some(CAUSAL, 1))
def test_packed_sequences_equal_separate_ones(spec: Recurrence) -> None:
    starts = [0, 7, 7, 20, 90]
    call = call_of(spec, 90, batch=1)
    rows = call_of(spec, 1, batch=4, state=True).state
    assert rows is not None
    cu = torch.tensor(starts, dtype=torch.int32)
    out, end = recurrence(
        spec, call.q, call.k, call.v, **call.keywords(), cu_seqlens=cu, state=rows
    )
    assert end is not None
    for s, (a, b) in enumerate(itertools.pairwise(starts)):
        row = {key: t[s : s + 1] for key, t in rows.items()}
        alone, last = run(spec, call.part(spec, slice(a, b), row))
        close(out[:, :, a:b], alone, 1e-6)
        assert last is not None
        for key, value in last.items():
            close(end[key][s : s + 1], value, 1e-6)


def test_inputs_must_match_the_spec() -> None:
    spec = Recurrence(5, 3, decay="token")
    call = call_of(spec, 4)
    with pytest.raises(ValueError, match="needs input 'decay'"):
        recurrence(spec, call.q, call.k, call.v)
    with pytest.raises(ValueError, match="no input 'beta'"):
        recurrence(spec, call.q, call.k, call.v, decay=call.decay, beta=call.decay)
    with pytest.raises(ValueError, match="one batch row"):
        cu = torch.tensor([0, 4], dtype=torch.int32)
        recurrence(spec, call.q, call.k, call.v, decay=call.decay, cu_seqlens=cu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype: torch.dtype) -> None:
    for spec in (s for s in CAUSAL if s.normaliser != "max" and not s.bonus):
        low = call_of(spec, 70, batch=1).to(dtype)
        start = zero_state(spec, low)
        out, end = run(spec, replace(low, state=start))
        exact, last = run(spec, replace(low.to(torch.float32), state=start))
        assert out.dtype == dtype and end is not None and last is not None
        assert end["S"].dtype == torch.float32
        torch.testing.assert_close(out, exact.to(dtype), atol=0, rtol=0)
        torch.testing.assert_close(end["S"], last["S"], atol=0, rtol=0)


def swapped(t: Tensor | None) -> Tensor:
    """(B, H, N, ...) to the (B, N, H, ...) of other libraries."""
    assert t is not None
    return t.transpose(1, 2)


def test_gated_delta_equals_transformers() -> None:
    spec = Recurrence(16, 24, decay="token", correction="delta", scale=16**-0.5)
    call = call_of(spec, 150, group=1, strength=0.2)
    args = [swapped(t) for t in (call.q, call.k, call.v, call.decay, call.beta)]
    out, end = run(spec, replace(call, state=zero_state(spec, call)))
    for theirs in (
        torch_chunk_gated_delta_rule(*args, output_final_state=True),
        torch_recurrent_gated_delta_rule(*args, output_final_state=True),
    ):
        assert end is not None
        close(out, theirs[0].transpose(1, 2), 1e-5)
        close(end["S"], theirs[1], 1e-5)


def test_channel_delta_equals_transformers() -> None:
    spec = Recurrence(16, 24, decay="channel", correction="delta", scale=16**-0.5)
    call = call_of(spec, 150, group=1, strength=0.2)
    args = [swapped(t) for t in (call.q, call.k, call.v, call.decay, call.beta)]
    theirs, state = chunk_kimi_delta_attention(*args, output_final_state=True)
    out, end = run(spec, replace(call, state=zero_state(spec, call)))
    assert end is not None
    close(out, theirs.transpose(1, 2), 1e-5)
    close(end["S"], state, 1e-5)


def test_scalar_decay_equals_transformers_state_space_scan() -> None:
    spec = Recurrence(16, 24, decay="token")
    call = call_of(spec, 150, group=1)
    dt = torch.rand(2, 150, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    A = torch.tensor([-0.3, -1.2])
    q, k, v = (swapped(t) for t in (call.q, call.k, call.v))
    theirs, state = mamba2_chunk_scan(v, dt, A, k, q, 32, return_final_states=True)
    mine = replace(
        call,
        v=call.v * swapped(dt).unsqueeze(-1),
        decay=swapped(dt * A),
        state=zero_state(spec, call),
    )
    out, end = run(spec, mine)
    assert end is not None
    close(out, theirs.transpose(1, 2), 1e-5)
    close(end["S"], state.transpose(-1, -2), 1e-5)


def test_max_normaliser_equals_transformers() -> None:
    spec = Recurrence(16, 24, decay="token", normaliser="max", scale=16**-0.5)
    call = call_of(spec, 60, group=1)
    forget = torch.randn(2, 2, 60, generator=torch.Generator().manual_seed(1)) + 2
    theirs = mlstm_recurrent_sequence_native(
        call.q, call.k, call.v, call.gate, forget, eps=0.0, dtype_state=torch.float32
    )
    close(run(spec, replace(call, decay=F.logsigmoid(forget)))[0], theirs, 1e-4)
