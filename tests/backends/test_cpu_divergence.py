"""The divergence of logits in generated C++ against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.backends.cpu import divergence as kernel
from rewriter.backends.ops import divergence as ops

if isinstance(kernel.find(torch.float32), str):
    pytest.skip(f"no kernel here: {kernel.find(torch.float32)}", allow_module_level=True)

ERROR = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the largest slope


def plain(
    student: Tensor, teacher: Tensor, labels: Tensor, ce: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by autograd."""
    student = student.double().requires_grad_()
    log_s, log_t = student.log_softmax(-1), teacher.double().log_softmax(-1)
    loss = (1 - ce) * F.kl_div(log_s, log_t, log_target=True, reduction="sum")
    known = labels >= 0
    loss = loss + weight * F.nll_loss(log_s[known], labels[known], reduction="sum")
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.one_of(st.integers(1, 150), st.sampled_from((1000, 4097))),
    scale=st.sampled_from((0.1, 3.0, 40.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    ce=st.sampled_from((0.0, 0.3, 1.0)),
    labelled=st.booleans(),
    seed=st.integers(0, 99),
    threads=st.sampled_from((1, 3)),
)
def test_any_size_equals_the_formula(
    rows: int,
    vocabulary: int,
    scale: float,
    dtype: torch.dtype,
    ce: float,
    labelled: bool,
    seed: int,
    threads: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        (scale * torch.randn(rows, vocabulary, generator=g)).to(dtype) for _ in range(2)
    )
    labels = torch.randint(-1, vocabulary, (rows,), generator=g)
    if not labelled:
        labels.fill_(-1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss, slope = kernel.forward(student, teacher, labels, ce, 0.7 * ce, 0.5)
        over = student.clone()
        again, there = kernel.forward(over, teacher, labels, ce, 0.7 * ce, 0.5, over)
    finally:
        torch.set_num_threads(before)
    assert there is over and torch.equal(over, slope) and torch.equal(again, loss)
    wanted, gradient = plain(student, teacher, labels, ce, 0.7 * ce)
    assert slope.dtype == dtype
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    if rows:
        error = (slope.double() - 0.5 * gradient).abs().max()
        assert float(error) <= ERROR[dtype] * max(0.5, float(gradient.abs().max()))


def test_extreme_logits_and_strides() -> None:
    wide = torch.randn(4, 2, 300, generator=torch.Generator().manual_seed(1))
    student, teacher = wide[:, 0].clone(), wide[:, 1]  # the teacher's rows are strided
    student[0, 7] = 1e4
    student[1, 7] = -1e4
    teacher[2, 3] = 1e4
    student[3] = student[3, 0]
    labels = torch.tensor([7, 8, 3, -1])
    loss, slope = kernel.forward(student, teacher, labels, 0.5, 1.0, 1.0)
    wanted, gradient = plain(student, teacher, labels, 0.5, 1.0)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=1e-6)


def test_nan_stays_in_its_row() -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(2))
    spoiled = logits.clone()
    spoiled[1, 5] = float("nan")
    loss, slope = kernel.forward(spoiled, logits, torch.full((3,), -1), 0.0, 0.0, 1.0)
    assert loss.isnan() and slope[1].isnan().all()
    assert slope[0].isfinite().all() and slope[2].isfinite().all()


@pytest.mark.parametrize("dtype", kernel.NAMES)
def test_generated_code_and_torch_agree(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(20, 333, generator=g).to(dtype) for _ in range(2))
    labels = torch.randint(-1, 333, (20,), generator=g)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    by_torch = ops.divergence(student, teacher, labels, 0.2, 0.3, 8)
    monkeypatch.delenv(ops.VARIABLE)
    generated = ops.divergence(student, teacher, labels, 0.2, 0.3, 8)
    torch.testing.assert_close(generated[0], by_torch[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        generated[1].double(), by_torch[1].double(), rtol=1e-2, atol=1e-2 * ERROR[dtype]
    )
