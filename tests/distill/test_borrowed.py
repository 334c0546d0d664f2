"""The trainer's own copies run attention on generated kernels; nobody else sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_standin import VOCABULARY, tiny_teacher
from torch import nn

from rewriter import rewrite
from rewriter.distill import Rows, parse_config
from rewriter.distill.borrowed import borrowed, quicken
from rewriter.distill.copies import private_copy
from rewriter.distill.match_logits import MatchLogits
from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.fused import Fused
from rewriter.mixers.exact.keep import Keep

HYBRID = {"rules": [{"layers": [0], "use": "keep"}, {"use": "hedgehog"}]}


def rows(masked: bool = False) -> Rows:
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 19:] = 0
    return Rows(ids, mask if masked else None)


def pair() -> tuple[Any, Any]:
    teacher = tiny_teacher()
    return teacher, rewrite(teacher, HYBRID, verify="none", force=True)


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, Mixer)]


def settings(**options: Any) -> Any:
    logits = {"steps": 4, "train": "all", **options}
    return parse_config({"length": 24, "fit": 0, "dtype": "float32", "logits": logits})


@pytest.mark.parametrize("masked", [False, True])
def test_both_copies_are_the_same_functions_as_before(masked: bool) -> None:
    teacher, student = pair()
    tensors: dict[int, torch.Tensor] = {}
    copies = [private_copy(m, torch.float32, tensors) for m in (teacher, student)]
    ids, mask = rows(masked).ids, rows(masked).mask
    with torch.no_grad():
        before = [m(input_ids=ids, attention_mask=mask).logits for m in copies]
        quicken(copies[0], copies[1], student, rows(masked))
        after = [m(input_ids=ids, attention_mask=mask).logits for m in copies]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert kinds(copies[0]) == [Fused, Fused]
    assert kinds(copies[1]) == [Fused, *kinds(student)[1:]]
    assert kinds(teacher) == [] and kinds(student)[0] is Keep


@pytest.mark.parametrize("train", ["core", "lora", "all"])
def test_losses_and_gradients_stay(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        teacher, student = pair()
        stage = MatchLogits(teacher, student, settings(train=train, ce=0.3))
        loss = stage.backward(rows(), 1.0).total
        trained = {**stage.core, **stage.body}
        return loss, {n: p.grad for n, p in trained.items() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr("rewriter.distill.match_logits.quicken", lambda *args: None)
    plain = gradients()
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert ours[1].keys() == plain[1].keys()
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, plain[1][name], rtol=1e-3, atol=1e-5)


def test_a_module_that_is_not_the_original_is_left_out() -> None:
    """The student computes with another scale than the teacher: its module is no copy of it."""
    teacher, student = pair()
    copies = [private_copy(m, torch.float32, {}) for m in (teacher, student)]
    wrong = copies[0].model.layers[1].self_attn
    wrong.scaling *= 0.5
    quicken(copies[0], copies[1], student, rows())
    assert copies[0].model.layers[1].self_attn is wrong
    assert kinds(copies[0]) == [Fused]


def test_other_parameters_are_left_out() -> None:
    teacher, student = pair()
    copies = [private_copy(m, torch.float32, {}) for m in (teacher, student)]
    student.model.layers[1].self_attn.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match=r"'model.layers.1.self_attn.extra' is not a parameter"):
        borrowed(student, teacher, "model.layers.1.self_attn")
    quicken(copies[0], copies[1], student, rows())
    assert kinds(copies[0]) == [Fused]
