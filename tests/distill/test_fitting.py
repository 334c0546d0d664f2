"""The start from data, on a small model: every core is nearer to its original than before."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import small_llama
from transformers import LlamaForCausalLM

from rewriter.api import inspect
from rewriter.distill import distill, parse_config
from rewriter.distill.data import Rows
from rewriter.distill.fitting import core_gaps, fit_cores
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Target, realise, share_parameters

MIXERS = ("gla", "linear_shortcut")


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return small_llama(vocab_size=61)


@pytest.fixture(scope="module")
def pattern(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    sites = inspect(teacher).sites
    assert [s.hidden_dim for s in sites] == [32, 32]
    targets = [Target(s, mixer, {}) for s, mixer in zip(sites, MIXERS, strict=True)]
    return realise(share_parameters(teacher), targets, examples_for(teacher))


IDS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.nightly  # 14 s, most of it tracing
def test_every_core_comes_nearer_and_decodes(
    teacher: LlamaForCausalLM, pattern: LlamaForCausalLM
) -> None:
    student, ids = copy.deepcopy(pattern), IDS
    gaps = core_gaps(student, Rows(ids))
    report = fit_cores(student, Rows(ids))
    assert [f.mixer for f in report] == list(MIXERS)
    assert {f.fqn: f.before for f in report} == gaps
    assert all(f.after < f.before and f.after < 1.0 for f in report)
    assert core_gaps(student, Rows(ids)) == pytest.approx({f.fqn: f.after for f in report})
    assert student.config.use_cache
    student.train()
    assert core_gaps(student, Rows(ids)) == pytest.approx({f.fqn: f.after for f in report})
    assert student.training and student.model.training
    student.eval()
    # A start that is nearer already is left alone.
    assert all(f.after <= f.before for f in fit_cores(student, Rows(ids.flip(1))))
    with torch.no_grad():
        whole = student(ids, use_cache=False).logits
        out = student(ids[:, :30], use_cache=True)
        rest = student(ids[:, 30:], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 30:], atol=1e-4, rtol=1e-4)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    missing = student.load_state_dict(before, strict=False)
    assert all(".core." in name for name in missing.missing_keys)
    assert missing.unexpected_keys == []
    back = {k: v for k, v in student.state_dict().items() if ".core." not in k}
    assert all(torch.equal(back[k], v) for k, v in before.items())
    teacher.load_state_dict(back)


@pytest.mark.nightly
def test_distillation_starts_from_the_fit(
    teacher: LlamaForCausalLM, pattern: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Before stage 1 and there alone; a resumed run goes on from its checkpoint instead."""
    rows = Rows(IDS)
    fitted = copy.deepcopy(pattern)
    wanted = {f.fqn: f.after for f in fit_cores(fitted, rows)}
    still = {"steps": 1, "lr": 1e-12, "warmup": 0.0}
    settings = {"length": 40, "dtype": "float32"}
    for stages, reached in (
        ({"layers": still}, wanted),
        ({"layers": still, "fit": 0}, core_gaps(pattern, rows)),
        ({"logits": {**still, "train": "core"}}, core_gaps(pattern, rows)),
    ):
        student = copy.deepcopy(pattern)
        distill(teacher, student, rows, parse_config({**settings, **stages}), folder=tmp_path)
        assert core_gaps(student, rows) == pytest.approx(reached, rel=1e-3)
        again = copy.deepcopy(pattern)
        distill(teacher, again, rows, parse_config({**settings, **stages}), folder=tmp_path)
        assert all(torch.equal(v, student.state_dict()[n]) for n, v in again.state_dict().items())
        shutil.rmtree(tmp_path)
