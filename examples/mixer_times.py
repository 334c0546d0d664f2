"""Times and state of one layer's core, and of one MLP block, for `mixer_table.py`.

Processor time of one thread, medians. A core decodes as it does under `generate`: behind a cache
layer that owns its state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State
from rewriter.mixers.base import Mixer
from rewriter.mixers.registry import get
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import sample

LENGTHS = (2048, 8192)
PROMPTS, TOKENS = 3, 20  # prompts of a length, and tokens behind the last one

Step = Callable[[Tokens], object]


def core_times(site: AttentionSite, mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a mixer at its start: what it computes does not depend on what it learned."""
    core = get(mixer)(site, get(mixer).Options(**options), 0).eval()

    def begin() -> tuple[Step, Callable[[], State]]:
        cache = DynamicCache()

        def step(x: Tokens) -> object:
            return core(x.q, x.k, x.v, _no_terms(core), cache, hidden=x.hidden)

        return step, lambda: cache.layers[0].state

    return _times(site, begin)


def softmax_times(site: AttentionSite) -> dict[str, Any]:
    """Of the original: torch's attention behind transformers' cache."""

    def begin() -> tuple[Step, Callable[[], State]]:
        cache = DynamicCache()

        def step(x: Tokens) -> object:
            k, v = cache.update(x.k, x.v, 0)
            return F.scaled_dot_product_attention(
                x.q, k, v, is_causal=x.count > 1, scale=site.scale, enable_gqa=True
            )

        return step, lambda: {"k": cache.layers[0].keys, "v": cache.layers[0].values}

    return _times(site, begin)


def block_times(block: nn.Module, width: int) -> dict[str, Any]:
    """Of an MLP block."""
    out = {}
    with torch.inference_mode():
        for length in LENGTHS:
            rows = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
            prompt = [_seconds(lambda x: block(x), rows) for _ in range(PROMPTS + 1)]
            token = [_seconds(lambda x: block(x), rows[:, :1]) for _ in range(TOKENS)]
            out[str(length)] = {"prefill": median(prompt[1:]), "token": median(token)}
    return {"speed": out}


def _times(
    site: AttentionSite, begin: Callable[[], tuple[Step, Callable[[], State]]]
) -> dict[str, Any]:
    """Seconds for a prompt and for one token behind it, and bytes kept."""
    out = {}
    with torch.inference_mode():
        for length in LENGTHS:
            x = sample(site, length + TOKENS, batch=1)
            begin()[0](x.cut(0, 64))  # builds kernels
            prompt = []
            for _ in range(PROMPTS):
                step, state = begin()
                prompt.append(_seconds(step, x.cut(0, length)))
            pieces = [x.cut(n, n + 1) for n in range(length, length + TOKENS)]
            out[str(length)] = {
                "prefill": median(prompt),
                "token": median([_seconds(step, piece) for piece in pieces]),
                "state": sum(t.numel() * t.element_size() for t in state().values()),
            }
    return {"speed": out}


def _no_terms(core: Mixer) -> tuple[Tensor | None, ...]:
    return (None,) * len(core.site.terms)


def _seconds(run: Callable[[Any], object], x: object) -> float:
    began = time.process_time()
    run(x)
    return time.process_time() - began
