"""The product behind the logits, taken inside the loss, against logits made whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_standin import VOCABULARY, tiny_student, tiny_teacher, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.distill import Rows, parse_config
from rewriter.distill.head import Heads, heads_of
from rewriter.distill.losses import divergence
from rewriter.distill.match_logits import MatchLogits


@settings(max_examples=30, deadline=None)
@given(
    chunk=st.integers(1, 12),
    ce=st.sampled_from((0.0, 0.4, 1.0)),
    biased=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_whole_logits(
    chunk: int, ce: float, biased: bool, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    own, other = nn.Linear(6, 33, bias=biased).double(), nn.Linear(8, 33, bias=biased).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]) if masked else None
    labels = torch.randint(-1, 33, (2, 5)) if ce else None
    trained = [x, *own.parameters()]
    wanted = divergence(own(x), other(y), mask, labels, ce, 100)
    gradients = torch.autograd.grad(wanted * 3, trained)
    loss = Heads(own, other).divergence(x, None if ce == 1 else y, mask, labels, ce, chunk)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    # Slopes are sums of float32 numbers.
    for ours, theirs in zip(torch.autograd.grad(loss * 3, trained), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", ["core", "lora", "all"])
def test_the_stage_takes_the_same_steps_either_way(train: str) -> None:
    def gradients(whole: bool) -> tuple[float, dict[str, torch.Tensor]]:
        stage = stage_of(train)
        if whole:
            stage._heads = None
        loss = stage.backward(Rows(token_rows(2)), 0.5).total
        assert (stage._heads is None) == whole
        return loss, {n: p.grad for n, p in {**stage.core, **stage.body}.items()}  # type: ignore[misc]

    (ours, mine), (theirs, wanted) = gradients(False), gradients(True)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert mine.keys() == wanted.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_logits_of_all_tokens_are_never_made() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = f(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCABULARY,):
                    largest = max(largest, x.numel())
            return out

    stage = stage_of("core", chunk=16)
    with Watch():
        stage.backward(Rows(token_rows(4)), 1.0)
    assert largest <= 32 * VOCABULARY  # of the weight, transposed; all logits are 96 rows
    assert sum(x.numel() for x in stage._heads.room) == 2 * 16 * VOCABULARY  # type: ignore[union-attr]


def test_outside_a_step_the_models_return_their_logits() -> None:
    stage = stage_of("core")
    ids = token_rows(2)
    before = stage.student(ids).logits
    stage.backward(Rows(ids), 1.0)
    assert torch.equal(stage.student(ids).logits, before)
    assert all(type(m).__module__.startswith("torch") for m in (stage.student.lm_head,))


@pytest.mark.parametrize("spoil", ["scaled", "hooked", "read", "class"])
def test_what_follows_the_layer_is_kept(spoil: str) -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    rows = Rows(token_rows(2))
    assert heads_of(student, teacher, rows) is not None
    if spoil == "scaled":
        student.register_forward_hook(lambda m, a, out: scaled(out))
    elif spoil == "hooked":
        student.lm_head.register_forward_hook(lambda m, a, out: out * 2)
    elif spoil == "read":
        student.register_forward_hook(lambda m, a, out: out.logits[0, 0, VOCABULARY - 1] and None)
    else:
        student.lm_head.__class__ = type("Own", (nn.Linear,), {})
    assert heads_of(student, teacher, rows) is None
    assert teacher(rows.ids).logits.shape[-1] == VOCABULARY


def scaled(out: Any) -> Any:
    out.logits = out.logits * 0.5
    return out


def stage_of(train: str, **fields: Any) -> MatchLogits:
    teacher = tiny_teacher()
    options = {"steps": 1, "train": train, "ce": 0.3, "chunk": 7, **fields}
    config = parse_config({"dtype": "float32", "length": 24, "logits": options})
    return MatchLogits(teacher, tiny_student(teacher), config)
