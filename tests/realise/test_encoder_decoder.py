"""Encoder-decoder models: both sequences, cross attention, and the cache that holds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import VOCABULARY, sharpen
from torch import nn

import rewriter

TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 3,
}
BODY: dict[str, Any] = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**BODY, max_position_embeddings=64, forced_eos_token_id=None)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**BODY, max_source_positions=20, max_target_positions=64, num_mel_bins=8)
    ),
}
CROSS = {"bart": [2], "t5": [3, 5], "whisper": [2]}
NIGHTLY = pytest.mark.nightly


def build(name: str) -> Any:
    torch.manual_seed(0)
    return sharpen(MODELS[name]()).eval()


def source(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, name: str, **options: Any) -> torch.Tensor:
    return model.generate(**source(name), max_new_tokens=7, do_sample=False, **options)


@pytest.mark.parametrize("name", [pytest.param(n, marks=NIGHTLY) for n in MODELS])
def test_the_identity_is_proved_everywhere_and_generates(name: str) -> None:
    model = build(name)
    result = rewriter.rewrite(model, "identity", on_miss="error")
    report = rewriter.report_of(result)
    assert [d.status for d in report.plan.decisions] == ["done"] * len(report.sites)
    assert [site.index for site in report.sites if site.cross] == CROSS[name]
    assert report.passed
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        assert torch.equal(generated(result, name, **options), generated(model, name, **options))


@pytest.mark.parametrize("name", ["bart", pytest.param("whisper", marks=NIGHTLY)])
def test_mixers_serve_self_attention_and_leave_the_source_alone(name: str) -> None:
    result = rewriter.rewrite(build(name), "hedgehog", verify="quick")
    report = rewriter.report_of(result)
    assert [d.status for d in report.plan.decisions] == ["done", "done", "refused"]
    assert "cross attention" in str(report.plan.decisions[2].reason)
    assert report.passed
    cached, plain = (generated(result, name, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
