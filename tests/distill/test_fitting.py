"""The start from data, on a small model: every core is nearer to its original than before."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.api import inspect
from rewriter.distill.fitting import fit_cores
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Target, realise, share_parameters

MIXERS = ("gla", "linear_shortcut")


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.nightly  # 14 s, most of it tracing
def test_every_core_comes_nearer_and_decodes(teacher: LlamaForCausalLM) -> None:
    sites = inspect(teacher).sites
    assert [s.hidden_dim for s in sites] == [32, 32]
    targets = [Target(s, mixer, {}) for s, mixer in zip(sites, MIXERS, strict=True)]
    student = realise(share_parameters(teacher), targets, examples_for(teacher))
    ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    report = fit_cores(student, {"input_ids": ids})
    assert [(f.fqn, f.mixer) for f in report] == [(t.site.fqn, t.mixer) for t in targets]
    assert all(f.after < f.before and f.after < 1.0 for f in report)
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
