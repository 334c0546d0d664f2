"""Recurrences, forward, backward and step, against a token loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_recurrence_cases import Shape, error, make
from triton_recurrence_rows import FIELDS, rows, wide

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.triton import recurrence
from rewriter.ir.recurrence import Recurrence

PACKED = Shape(length=150, cuts=(0, 3, 70, 70, 150))
TWO = Shape(length=80, cuts=(0, 3, 80))
SHORT_PACKED = Shape(heads=1, length=25, cuts=(0, 3, 25))
CHUNKED = [
    (Recurrence(16, 24), Shape(batch=2)),
    (Recurrence(70, 16, decay="token", scale=0.3), Shape(1, 4, 2, 70)),
    (Recurrence(16, 16, decay="head", normaliser="ones"), Shape(length=70)),
    (Recurrence(16, 70, decay="token", normaliser="ones"), PACKED),
    (Recurrence(16, 16, decay="token", read="exclusive", bonus=True), TWO),
    (Recurrence(16, 16, causal=False, normaliser="ones"), TWO),
    (Recurrence(16, 16, causal=False, decay="token"), TWO),
    (Recurrence(16, 16, causal=False, decay="head"), Shape()),
    (Recurrence(16, 20, decay="channel", read="exclusive", bonus=True), SHORT_PACKED),
    (Recurrence(16, 20, correction="delta"), Shape(length=70)),
    (Recurrence(40, 20, decay="token", correction="delta"), Shape(length=80, cuts=(0, 3, 80))),
    (Recurrence(16, 16, decay="head", correction="delta", read="exclusive"), Shape(length=70)),
    (Recurrence(16, 20, decay="channel", correction="delta"), Shape(heads=1, length=20)),
]
LONG = [
    (Recurrence(16, 20, decay="channel", normaliser="ones"), Shape(length=20)),
    (Recurrence(16, 20, decay="channel", normaliser="ones"), Shape(length=150)),
    (Recurrence(16, 20, decay="channel", read="exclusive", bonus=True), PACKED),
    (Recurrence(40, 20, decay="token", correction="delta"), PACKED),
    (Recurrence(16, 20, decay="channel", correction="delta"), Shape(length=100)),
    (Recurrence(128, 128, decay="token", correction="delta"), Shape(length=140)),
    (Recurrence(80, 96, decay="token", normaliser="ones"), Shape(2, 4, 2, 200)),
]
LONG_CASES = [pytest.param(*case, marks=pytest.mark.nightly) for case in LONG]
WALKED = [
    (Recurrence(16, 20, decay="channel", correction="untied"), Shape(length=15)),
    (Recurrence(16, 20, correction="untied", read="exclusive"), SHORT_PACKED),
    (Recurrence(16, 20, decay="head", normaliser="ones"), Shape(length=1)),
    (
        Recurrence(16, 20, decay="token", normaliser="ones", read="exclusive", bonus=True),
        Shape(length=5),
    ),
    (
        Recurrence(16, 20, decay="token", correction="delta", read="exclusive", bonus=True),
        Shape(length=12),
    ),
    (
        Recurrence(16, 16, decay="channel", correction="delta"),
        Shape(length=7, cuts=(0, 2, 2, 7)),
    ),
]


def label(value: Recurrence | Shape | torch.dtype) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Shape):
        return f"{value.length}{'packed' if value.cuts else ''}"
    parts = (value.decay, value.correction, value.normaliser, value.read)
    return "-".join(parts) + ("" if value.causal else "-both")


HALF = [*CHUNKED[:3], *WALKED[:1]]
HALF_AT_NIGHT = [c for c in (*CHUNKED, *WALKED) if c not in HALF]


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        *((*c, torch.float32) for c in (*CHUNKED, *WALKED)),
        *((*c, torch.float16) for c in HALF),
        *(pytest.param(*c, torch.float16, marks=pytest.mark.nightly) for c in HALF_AT_NIGHT),
        *(pytest.param(*c, torch.float32, marks=pytest.mark.nightly) for c in LONG),
    ],
    ids=label,
)
def test_outputs(spec: Recurrence, shape: Shape, dtype: torch.dtype) -> None:
    x = make(spec, shape, dtype)
    out, end = recurrence.forward(spec, x)
    want, state = rows(spec, x)
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    assert error(out, want) <= bound
    if spec.causal:
        assert error(end, state) <= bound
    else:
        assert torch.equal(end, x.start if x.start is not None else torch.zeros_like(end))


@pytest.mark.parametrize(("spec", "shape"), [*CHUNKED, *LONG_CASES], ids=label)
def test_gradients(spec: Recurrence, shape: Shape) -> None:
    x = make(spec, shape)
    names = [n for n in FIELDS if getattr(x, n) is not None]
    leaves = wide(x)
    for n in names:
        getattr(leaves, n).requires_grad_()
    want, end = rows(spec, leaves)
    g = torch.Generator().manual_seed(3)
    grad_out = torch.randn(want.shape, generator=g, dtype=torch.float64)
    grad_end = torch.randn(end.shape, generator=g, dtype=torch.float64)
    total = (want * grad_out).sum()
    if spec.causal:
        total = total + (end * grad_end).sum()
    else:  # nothing reads the state, which is handed on as it is
        total = total + (leaves.start * grad_end).sum()
    expected = torch.autograd.grad(total, [getattr(leaves, n) for n in names])
    found = recurrence.backward(spec, x, grad_out.float(), grad_end.float())
    for n, y in zip(names, expected, strict=True):
        scale = terms(spec, x, grad_out, grad_end) if spec.decay == "head" and n == "decay" else 0
        assert error(getattr(found, n), y, scale) <= 2e-5, n


def terms(
    spec: Recurrence, x: RecurrenceInputs, grad_out: torch.Tensor, grad_end: torch.Tensor
) -> float:
    """Size of what a constant decay's gradient is summed from: absolute values over the tokens."""
    assert x.decay is not None
    each = x.decay.double()[None, :, None].expand(x.k.shape[:3]).clone().requires_grad_()
    want, end = rows(replace(spec, decay="token"), replace(x, decay=each))
    total = (want * grad_out).sum() + ((end * grad_end).sum() if spec.causal else 0)
    (grad,) = torch.autograd.grad(total, each)
    return float(grad.abs().sum((0, 2)).max())


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("gate", [pytest.param(1e4, marks=pytest.mark.nightly), "mixed"])
def test_extreme_gates(decay: str, gate: float | str) -> None:
    spec = Recurrence(16, 16, decay=decay)  # type: ignore[arg-type]
    x = make(spec, Shape(heads=1, length=20))
    assert x.decay is not None
    g = torch.zeros_like(x.decay)
    if gate == "mixed":
        g = x.decay.clone()
        g[:, :, 12:14] = -torch.inf
    else:
        g -= float(gate)
    x = replace(x, decay=g)
    out, end = recurrence.forward(spec, x)
    want, state = rows(spec, x)
    assert error(out, want) <= 2e-5
    assert error(end, state) <= 2e-5
    found = recurrence.backward(spec, x, torch.ones_like(out), torch.ones_like(end))
    assert all(torch.isfinite(t).all() for t in found if t is not None)


def test_steps_are_the_chunked_form() -> None:
    spec = Recurrence(16, 16, decay="token", correction="delta")
    x = make(spec, Shape(heads=1, length=67))
    whole, end = recurrence.forward(spec, x)
    first, middle = recurrence.forward(spec, part(x, slice(0, 65), x.start))
    last, final = recurrence.forward(spec, part(x, slice(65, 67), middle))
    assert error(torch.cat((first, last), 2), whole.double()) <= 1e-5
    assert error(final, end.double()) <= 1e-5


def part(x: RecurrenceInputs, at: slice, start: torch.Tensor | None) -> RecurrenceInputs:
    given = {n: getattr(x, n)[:, :, at] for n in ("q", "k", "v", "decay", "beta")}
    return RecurrenceInputs(**given, start=start)


def test_any_strides() -> None:
    spec = Recurrence(16, 16, decay="token")
    x = make(spec, Shape(length=70, heads=2, kv_heads=2))
    turned = {
        n: getattr(x, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v")
    }
    assert x.decay is not None
    turned["decay"] = torch.stack((x.decay, x.decay), -1)[..., 0]
    want, _ = recurrence.forward(spec, x)
    assert torch.equal(recurrence.forward(spec, replace(x, **turned))[0], want)
