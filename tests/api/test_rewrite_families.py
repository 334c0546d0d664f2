"""Families whose call or score differs from the rest: rewritten whole, nothing left out."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import VOCABULARY

import rewriter

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
ENCODERS = {
    # one bias for all calls, and a mask only where there is padding
    "mpnet": lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**SMALL)),
}
FAMILIES = {
    # hands `use_cache` on without naming it, and fills a cache unless told not to
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SMALL)),
    # its attention returns weights, with a learned sink taken out of them
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, head_dim=16)),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return {**FAMILIES, **ENCODERS}[name]().eval()


def ids_of(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_attention_is_rewritten_and_none_changes_a_bit(name: str) -> None:
    model = built(name)
    result = rewriter.rewrite(model, {"rules": [{"use": "keep"}]}, verify="none")
    decisions = rewriter.report_of(result).plan.decisions
    assert [d.status for d in decisions] == ["done", "done"]
    mask = torch.ones(3, 23, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        for length, more in ((9, {}), (23, {"attention_mask": mask})):
            call = {"input_ids": ids_of(3, length), "use_cache": False, **more}
            assert torch.equal(model(**call).logits, result(**call).logits)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_cache_is_filled_once_for_each_token(name: str) -> None:
    model = built(name)
    result = rewriter.rewrite(model, {"rules": [{"use": "keep"}]}, verify="none")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids_of(1, 9), **options)
    assert torch.equal(result.generate(ids_of(1, 9), **options), expected)


@pytest.mark.parametrize("policy", [{"rules": [{"use": "keep"}]}, "exact"])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_mask_that_is_there_only_with_padding(name: str, policy: Any) -> None:
    model = built(name)
    result = rewriter.rewrite(model, policy, verify="none")
    assert [d.status for d in rewriter.report_of(result).plan.decisions] == ["done", "done"]
    mask = torch.ones(3, 23, dtype=torch.long)
    mask[1, 11:] = 0
    for copied in (result, pickle.loads(pickle.dumps(result))):
        with torch.no_grad():
            for more in ({}, {"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}):
                got = copied(input_ids=ids_of(3, 23), **more).logits
                expected = model(input_ids=ids_of(3, 23), **more).logits
                assert torch.equal(got[0], expected[0]) or policy == "exact"
                torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
