"""A tiny decoder and its attention, found once."""

from __future__ import annotations

import pytest
import torch
from tiny_models import small_llama

import rewriter
from rewriter.ir.site import AttentionSite


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return small_llama(
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def sites(model: torch.nn.Module) -> tuple[AttentionSite, ...]:
    return rewriter.inspect(model).sites


@pytest.fixture(scope="session")
def stream() -> torch.Tensor:
    return torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(0))
