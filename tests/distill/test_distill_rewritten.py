"""Distillation of what `rewrite` really returns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distill_standin import VOCABULARY, tiny_teacher, token_rows
from transformers import BertConfig, BertModel

from rewriter import rewrite
from rewriter.distill import Rows, distill, parse_config
from rewriter.distill.copies import core_names, rewritten_cores, rewritten_owners
from rewriter.distill.fitting import fit_cores
from rewriter.distill.lora import site_projections
from rewriter.distill.match_layers import MatchLayers
from rewriter.distill.stages import dropping
from rewriter.evaluate import kl_to_teacher, without_branch

pytestmark = pytest.mark.usefixtures("generated_kernels")

POLICY = {
    "name": "test",
    "rules": [{"use": "hedgehog_window", "options": {"window": 4, "sinks": 1}}],
}


@pytest.fixture(scope="module")
def rewritten() -> tuple[Any, Any]:
    teacher = tiny_teacher()
    return teacher, rewrite(teacher, POLICY, verify="none", force=True)


def gap(teacher: Any, student: Any, ids: torch.Tensor) -> float:
    return kl_to_teacher(student, teacher, ids).value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewritten_language_model_learns_in_both_stages(
    rewritten: tuple[Any, Any], dtype: str
) -> None:
    teacher, pattern = rewritten
    student = copy.deepcopy(pattern)
    assert len(rewritten_owners(student)) == 2 and core_names(student)
    assert len(site_projections(student)) == 8
    before = copy.deepcopy(teacher.state_dict())
    keys = list(student.state_dict())
    rows = Rows(token_rows(8, 48))
    gaps = [gap(teacher, student, rows.ids)]
    for stage in (
        {"layers": {"steps": 30, "batch": 2, "lr": 3e-2}},
        {"logits": {"steps": 15, "batch": 2, "train": "lora", "body_lr": 1e-3}},
    ):
        distill(teacher, student, rows, parse_config({"dtype": dtype, "length": 48, **stage}))
        gaps.append(gap(teacher, student, rows.ids))
    assert gaps[0] > gaps[1] > gaps[2], gaps
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    assert list(student.state_dict()) == keys
    with without_branch(student, "linear") as count:
        assert count == 2
        assert gap(teacher, student, rows.ids) > gaps[2]
    assert gap(teacher, student, rows.ids) == gaps[2]
    # The distilled model still generates, and its cache agrees with the full forward.
    prompt = rows.ids[:1, :10]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": VOCABULARY - 1}
    with_cache = student.generate(prompt, use_cache=True, **options)
    assert torch.equal(with_cache, student.generate(prompt, use_cache=False, **options))


def test_rewritten_encoder_learns_with_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    teacher = BertModel(config).eval()
    student = rewrite(
        teacher, {"name": "test", "rules": [{"use": "hedgehog"}]}, verify="none", force=True
    )
    ids = token_rows(8, 16)
    mask = torch.ones_like(ids)
    mask[::2, 12:] = 0
    settings = parse_config(
        {"dtype": "float32", "length": 16, "layers": {"steps": 30, "batch": 4, "lr": 3e-2}}
    )
    (stage,) = distill(teacher, student, Rows(ids, mask), settings).stages
    assert stage.last < 0.9 * stage.first and len(stage.parts) == 2


def test_the_window_is_dropped_as_often_as_asked(rewritten: tuple[Any, Any]) -> None:
    _, student = rewritten
    cores = list(rewritten_cores(student).values())
    torch.manual_seed(0)
    met = 0
    for _ in range(200):
        with dropping(student, 0.25):
            met += sum(core.disabled == {"window"} for core in cores)
        assert not any(core.disabled for core in cores)
    assert met / 400 == pytest.approx(0.25, abs=0.07)
    with dropping(student, 0.0):
        assert not any(core.disabled for core in cores)


@pytest.mark.parametrize("stage", ["layers", "logits"])
def test_training_with_a_dropped_window_teaches_the_far_field(
    rewritten: tuple[Any, Any], stage: str
) -> None:
    """Without its window the student is nearer to the teacher than one that always had it."""
    teacher, pattern = rewritten
    rows = Rows(token_rows(8, 48))
    gaps = []
    for chance in (0.0, 0.5):
        student = copy.deepcopy(pattern)
        settings = {"steps": 30, "batch": 2, "lr": 3e-2, "drop_window": chance}
        if stage == "logits":
            settings["train"] = "core"
        config = parse_config({"dtype": "float32", "length": 48, "fit": 0, stage: settings})
        distill(teacher, student, rows, config)
        with without_branch(student, "window"):
            gaps.append(gap(teacher, student, rows.ids))
    assert gaps[1] < gaps[0]


def test_the_layer_stage_never_makes_the_teachers_logits(rewritten: tuple[Any, Any]) -> None:
    teacher, student = rewritten
    config = parse_config({"dtype": "float32", "length": 16, "layers": {"steps": 1}})
    stage = MatchLayers(teacher, student, config)
    called: list[int] = []
    stage.teacher.get_submodule("lm_head").register_forward_hook(lambda *_: called.append(1))
    losses = stage.backward(Rows(token_rows(2, 16)), 1.0)
    assert len(losses.parts) == 2 and not called


def test_a_start_from_data_runs_no_more_of_the_model_than_it_needs(
    rewritten: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = copy.deepcopy(rewritten[1])
    called: list[str] = []
    for name in ("model.embed_tokens", "lm_head"):
        student.get_submodule(name).register_forward_hook(lambda *_, n=name: called.append(n))
    assert fit_cores(student, Rows(token_rows(2, 16))) == () and not called
    core = next(iter(rewritten_cores(student).values()))
    monkeypatch.setattr(type(core), "takes_data", True)
    fit_cores(student, Rows(token_rows(2, 16)))
    assert called == ["model.embed_tokens"]
