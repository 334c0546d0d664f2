"""Recurrences of bfloat16 in tiles, on the instructions or on an emulation with their rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from recurrence_cases import Call, call_of
from recurrence_oracles import token_loop
from torch import Tensor

from rewriter.backends.cpu import recurrence as cpu
from rewriter.backends.cpu import recurrence_forms as forms
from rewriter.backends.cpu.build import NoKernel, find_compiler
from rewriter.backends.cpu.recurrence_unit import in_tiles
from rewriter.backends.cpu.target import VARIABLE, Target, cpu_flags, host_target
from rewriter.backends.inputs import RecurrenceInputs
from rewriter.ir.recurrence import Recurrence

pytestmark = pytest.mark.skipif(
    isinstance(find_compiler(), NoKernel), reason="no C++ compiler on this machine"
)

LINEAR = Recurrence(64, 32, normaliser="ones", scale=0.3)
TOKEN = Recurrence(32, 64, decay="token", normaliser="ones")
HEAD = Recurrence(32, 32, decay="head", read="exclusive", scale=0.5)
DELTA = Recurrence(32, 32, decay="token", correction="delta", scale=0.7)
SPECS = {"linear": LINEAR, "token": TOKEN, "head": HEAD, "delta": DELTA}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    host = host_target()
    if not (isinstance(host, Target) and host.tiles):
        if not {"avx2", "fma"} <= cpu_flags():
            pytest.skip("this processor lacks AVX2")
        monkeypatch.setenv(VARIABLE, "tiles_on_avx2")
    cpu._kernel.cache_clear()
    yield
    cpu._kernel.cache_clear()


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than FEW are chunks here, whatever is faster on this machine."""
    monkeypatch.setattr(cpu, "_steps", lambda *_: forms.FEW)


def forward(spec: Recurrence, call: Call, cu: Tensor | None = None) -> tuple[Tensor, Tensor]:
    target = host_target()
    assert isinstance(target, Target) and in_tiles(spec, call.v.dtype, target)
    assert cpu.decline(spec, call.v.dtype, False) is None
    start = None if call.state is None else call.state["S"].float()
    given = call.keywords()
    return cpu.forward(
        spec, RecurrenceInputs(call.q, call.k, call.v, **given, cu_seqlens=cu, start=start)
    )


def halves(spec: Recurrence, n: int, **options: object) -> Call:
    """q, k and v in bfloat16, the rest in float32."""
    call = call_of(spec, n, **options)  # type: ignore[arg-type]
    q, k, v = (t.bfloat16() for t in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def close(mine: Tensor, theirs: Tensor, bound: float) -> None:
    assert mine.shape == theirs.shape
    assert bool(torch.isfinite(mine).all())
    error = float((mine.double() - theirs.double()).abs().max())
    assert error <= bound * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("n", [9, 32, 33, 64, 65, 130, 200])
def test_equals_the_definition(spec: Recurrence, n: int) -> None:
    """Outputs to the precision of bfloat16; the state, which is float32, to that of float32."""
    for group, state in ((1, False), (3, True)):
        call = halves(spec, n, batch=2, kv_heads=2, group=group, state=state, strength=0.1)
        out, end = forward(spec, call)
        expected, last = token_loop(spec, call.double())
        assert out.dtype == torch.bfloat16
        close(out, expected, 1e-2)
        close(end, last["S"], 1e-5)


@pytest.mark.parametrize("gate", [-torch.inf, -1e30, -200.0, 0.0])
def test_extreme_gates(gate: float) -> None:
    call = halves(TOKEN, 150, batch=1, kv_heads=2, group=1, state=True)
    assert call.decay is not None
    call = replace(call, decay=torch.where(torch.rand_like(call.decay) < 0.3, gate, call.decay))
    out, end = forward(TOKEN, call)
    expected, last = token_loop(TOKEN, call.double())
    close(out, expected, 1e-2)
    close(end, last["S"], 1e-5)


def test_a_value_that_is_not_a_number_reaches_later_tokens_only() -> None:
    for spec in SPECS.values():
        call = halves(spec, 100, batch=1, kv_heads=2, group=1, state=False)
        v = call.v.clone()
        v[0, 0, 40] = torch.nan
        out, _ = forward(spec, replace(call, v=v))
        clean, _ = forward(spec, call)
        close(out[0, 0, :40], clean[0, 0, :40], 1e-2)
        close(out[0, 1], clean[0, 1], 1e-2)
        assert bool(out[0, 0, 41:].isnan().all())


def test_packed_and_split_calls() -> None:
    before = torch.get_num_threads()
    call = halves(TOKEN, 1100, batch=1, kv_heads=1, group=2, state=False, strength=0.05)
    cu = torch.tensor([0, 70, 71, 700, 1100], dtype=torch.int32)
    try:
        torch.set_num_threads(1)
        alone = forward(TOKEN, call)
        packed, _ = forward(TOKEN, call, cu)
        torch.set_num_threads(2)
        for mine, theirs in zip(forward(TOKEN, call), alone, strict=True):
            close(mine, theirs, 1e-2)
        close(packed[:, :, :70], alone[0][:, :, :70], 1e-2)
        piece = call.part(TOKEN, slice(71, 700), None)
        close(packed[:, :, 71:700], forward(TOKEN, piece)[0], 1e-2)
    finally:
        torch.set_num_threads(before)


def test_large_outputs_that_go_past_the_caches_equal_those_of_single_heads() -> None:
    call = halves(TOKEN, 2085, batch=2, kv_heads=8, group=1, state=False)
    out, end = forward(TOKEN, call)
    assert out.numel() * out.element_size() >= 2**22
    assert call.decay is not None
    for row, head in ((0, 0), (0, 7), (1, 3)):
        at = (slice(row, row + 1), slice(head, head + 1))
        one = replace(call, q=call.q[at], k=call.k[at], v=call.v[at], decay=call.decay[at])
        alone, last = forward(TOKEN, one)
        assert torch.equal(out[at], alone) and torch.equal(end[at], last)
