from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_standin import tiny_student, tiny_teacher, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.distill import Rows, distill, parse_config
from rewriter.distill.copies import core_names
from rewriter.distill.losses import divergence, output_error
from rewriter.distill.match_layers import MatchLayers
from rewriter.distill.match_logits import MatchLogits
from rewriter.errors import UsageError


def settings_of(**fields: Any) -> Any:
    return parse_config({"dtype": "float32", "length": 24, **fields})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 100), st.floats(0, 1))
def test_divergence_equals_autograd_on_the_plain_formula(chunk: int, seed: int, ce: float) -> None:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 5, 7, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.randint(0, 7, (2, 5), generator=g)
    labels[:, -1] = -1
    value = divergence(student, teacher, mask, labels, ce, chunk)
    value.backward()
    plain = student.detach().clone().requires_grad_()
    valid = mask.bool()
    s, t, y = plain[valid].log_softmax(-1), teacher[valid].log_softmax(-1), labels[valid]
    kl = F.kl_div(s, t, log_target=True, reduction="sum") / len(y)
    nll = F.nll_loss(s, y.clamp_min(0), reduction="none")[y >= 0].mean()
    expected = (1 - ce) * kl + ce * nll
    expected.backward()
    torch.testing.assert_close(value.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    assert student.grad is not None and plain.grad is not None
    torch.testing.assert_close(student.grad, plain.grad, atol=1e-6, rtol=1e-5)


def test_output_error_is_relative_and_ignores_padding() -> None:
    teacher = torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    student = teacher + 0.1 * torch.randn(2, 6, 8)
    base = output_error(student, teacher, mask)
    spoiled = torch.where(mask[..., None].bool(), student, torch.full_like(student, 1e4))
    assert output_error(spoiled, teacher, mask) == base
    torch.testing.assert_close(output_error(student * 50, teacher * 50, mask), base)
    valid = teacher[mask.bool()]
    flat = valid.mean(0).expand_as(teacher)
    assert output_error(flat, teacher, mask).item() == pytest.approx(1.0, rel=1e-5)


def test_layer_stage_gradient_is_that_of_each_layer_alone() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    stage = MatchLayers(teacher, student, settings_of(layers={"steps": 1}))
    rows = Rows(token_rows(2))
    losses = stage.backward(rows, 0.5)
    assert list(losses.parts) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]

    # Independent of hooks: record what the teacher's modules see, then call the student's.
    seen: dict[str, Any] = {}

    def record(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] = (args, kwargs, output[0])

        return hook

    for path in losses.parts:
        module = teacher.get_submodule(path)
        module.register_forward_hook(record(path), with_kwargs=True)
    with torch.no_grad():
        teacher(input_ids=rows.ids, use_cache=False)
    for path, (args, kwargs, target) in seen.items():
        out = student.get_submodule(path)(*args, **kwargs)[0]
        centred = target - target.flatten(0, 1).mean(0)
        loss = (out - target).square().mean() / centred.square().mean()
        assert losses.parts[path] == pytest.approx(loss.item(), rel=1e-5)
        core = student.get_submodule(path).core
        grads = torch.autograd.grad(0.5 * loss, list(core.parameters()))
        for (name, _), grad in zip(core.named_parameters(), grads, strict=True):
            torch.testing.assert_close(stage.core[f"{path}.core.{name}"].grad, grad)
    # A second batch stops the teacher after its last rewritten module and counts the same.
    assert stage.backward(rows, 0.5).parts == losses.parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_stage_learns_and_touches_only_the_core(dtype: str) -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    before = copy.deepcopy(teacher.state_dict())
    start = {n: student.get_parameter(n).detach().clone() for n in core_names(student)}
    config = settings_of(layers={"steps": 60, "batch": 2}, dtype=dtype)
    result = distill(teacher, student, Rows(token_rows()), config)
    (stage,) = result.stages
    assert stage.last < stage.first
    assert stage.tokens == 60 * 2 * 24 and set(stage.parts) == {
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    }
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in start.items():
        assert not torch.equal(student.get_parameter(name), value), name
        assert student.get_parameter(name).dtype == torch.float32
    for name, parameter in teacher.named_parameters():
        assert student.get_parameter(name) is parameter
        assert parameter.requires_grad
    assert not any(m._forward_hooks for m in teacher.modules())


def teacher_within_reach() -> tuple[Any, Any]:
    """A teacher that is the student's own family with other core parameters."""
    teacher = tiny_student(tiny_teacher())
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name in core_names(teacher):
            torch.manual_seed(len(name))
            teacher.get_parameter(name).add_(torch.randn(8, 8))
    return teacher, student


def test_layer_stage_recovers_a_core_that_it_can_express() -> None:
    teacher, student = teacher_within_reach()
    config = settings_of(layers={"steps": 400, "batch": 2, "lr": 3e-2})
    (stage,) = distill(teacher, student, Rows(token_rows()), config).stages
    assert stage.last < 0.05 * stage.first


def logit_gap(teacher: Any, student: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        t = teacher(ids).logits.log_softmax(-1)
        s = student(ids).logits.log_softmax(-1)
    return F.kl_div(s, t, log_target=True, reduction="sum").item() / ids.numel()


@pytest.mark.parametrize("train", ["core", "lora", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logit_stage_learns_and_never_changes_the_teacher(train: str, dtype: str) -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    before = copy.deepcopy(teacher.state_dict())
    keys = list(student.state_dict())
    ids = token_rows()
    gap = logit_gap(teacher, student, ids)
    config = settings_of(
        logits={"steps": 40, "batch": 2, "train": train, "lr": 1e-2, "body_lr": 3e-3, "chunk": 7},
        dtype=dtype,
    )
    distill(teacher, student, Rows(ids), config)
    assert logit_gap(teacher, student, ids) < gap
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert list(student.state_dict()) == keys
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    q = "model.layers.0.self_attn.q_proj.weight"
    changed = student.get_parameter(q) is not teacher.get_parameter(q)
    assert changed == (train != "core")
    mlp = "model.layers.0.mlp.up_proj.weight"
    assert (student.get_parameter(mlp) is not teacher.get_parameter(mlp)) == (train == "all")


def test_logit_stage_recovers_a_core_that_it_can_express() -> None:
    teacher, student = teacher_within_reach()
    ids = token_rows()
    gap = logit_gap(teacher, student, ids)
    config = settings_of(logits={"steps": 400, "batch": 2, "train": "core", "lr": 3e-2})
    distill(teacher, student, Rows(ids), config)
    assert logit_gap(teacher, student, ids) < 0.1 * gap


def test_merged_low_rank_update_is_the_function_that_was_trained() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    stage = MatchLogits(teacher, student, settings_of(logits={"steps": 1, "train": "lora"}))
    g = torch.Generator().manual_seed(1)
    values = {n: torch.randn(p.shape, generator=g) * 0.1 for n, p in stage.body.items()}
    values |= {n: p.detach() * 1.1 for n, p in stage.core.items()}
    stage.write(values, student)
    with torch.no_grad():
        for name, parameter in {**stage.core, **stage.body}.items():
            parameter.copy_(values[name])
        ids = token_rows(2)
        torch.testing.assert_close(
            student(ids).logits, stage.student(input_ids=ids).logits, atol=2e-4, rtol=2e-4
        )
        assert len(stage.body) == 2 * 4 * 2


def test_student_with_padding_trains_on_tokens_alone() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    ids = token_rows(2)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    other = ids.clone()
    other[0, 20:] = 5
    stage = MatchLogits(
        teacher, student, settings_of(logits={"steps": 1, "train": "core", "ce": 0.5})
    )
    first = stage.backward(Rows(ids, mask), 1.0).total
    assert stage.backward(Rows(other, mask), 1.0).total == pytest.approx(first, rel=1e-6)


def test_what_cannot_train_is_refused_in_one_sentence() -> None:
    teacher = tiny_teacher()
    with pytest.raises(UsageError, match="No rewritten module has new parameters"):
        distill(
            teacher, copy.deepcopy(teacher), Rows(token_rows()), settings_of(layers={"steps": 1})
        )
    with pytest.raises(UsageError, match=r"train 'lora' or 'all'"):
        config = settings_of(logits={"steps": 1, "train": "core"})
        distill(teacher, copy.deepcopy(teacher), Rows(token_rows()), config)


def test_a_layer_takes_its_step_as_soon_as_its_gradients_are_there() -> None:
    """The gradients of one layer at a time are in memory, and the weights are those of all."""
    teacher = tiny_teacher()
    stage = MatchLayers(teacher, tiny_student(teacher), settings_of(layers={"steps": 1}))
    rows, held = Rows(token_rows(2)), list[set[str]]()

    def ready(number: int) -> None:
        held.append({n for n, p in stage.core.items() if p.grad is not None})
        for name in stage.groups[number]:
            stage.core[name].grad = None

    stage.backward(rows, 1.0, ready)
    assert held == [set(names) for names in stage.groups]
    assert all(p.grad is None for p in stage.core.values())


def test_only_the_rewritten_modules_are_copied_where_the_teacher_computes_as_it_is() -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    stage = MatchLayers(teacher, student, settings_of(layers={"steps": 1}))
    assert stage.teacher is teacher
    paths = [path for path, _ in stage.student.named_modules()]
    assert "model.layers.1.self_attn.q_proj" in paths and not any("mlp" in path for path in paths)
    inside = stage.student.get_submodule("model.layers.1.self_attn").get_parameter("q_proj.weight")
    outside = teacher.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert inside.data_ptr() == outside.data_ptr() and not inside.requires_grad
    before = teacher.config.use_cache, teacher.training
    stage.backward(Rows(token_rows(2)), 1.0)
    assert (teacher.config.use_cache, teacher.training) == before
    assert not any(p.grad is not None for p in teacher.parameters())
    half = MatchLayers(teacher, student, settings_of(layers={"steps": 1}, dtype="bfloat16"))
    copied = half.student.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert copied is half.teacher.get_parameter("model.layers.1.self_attn.q_proj.weight")
