"""A tiny decoder and its attention, found once."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.ir.site import AttentionSite


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        initializer_range=0.3,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def sites(model: torch.nn.Module) -> tuple[AttentionSite, ...]:
    return rewriter.inspect(model).sites


@pytest.fixture(scope="session")
def stream() -> torch.Tensor:
    return torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(0))
