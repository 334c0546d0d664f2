"""What a model takes at a length: time of a prefill and of a token after it, and its cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rewriter.evaluate.measurement import Measurement, pooled
from rewriter.evaluate.scoring import evaluating
from rewriter.passes.realise.cache_probe import new_cache


def speed(
    model: nn.Module,
    vocabulary: int,
    *,
    lengths: Sequence[int] = (512, 2048),
    samples: int = 3,
    steps: int = 8,
    seed: int = 0,
) -> list[Measurement]:
    """Prefill and decoding time and cache size at every length, one row of random tokens.

    Wall clock on the model's device, after one prefill that is not counted. The logits of the last
    token alone are made where the model can leave the others out.

    Args:
        vocabulary: number of token ids.
        samples: prefills that are timed.
        steps: single tokens timed after each prefill.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    out: list[Measurement] = []
    with evaluating(model):
        for length in lengths:
            ids = torch.randint(0, vocabulary, (1, length + steps), generator=generator).to(device)
            filled: list[float] = []
            stepped: list[float] = []
            size = 0
            for number in range(samples + 1):
                cache = new_cache(model)
                took = _timed(model, ids[:, :length], cache)
                size = cache_bytes(cache)
                if number:  # the first one compiles and warms up
                    filled.append(took)
                one = [ids[:, length + n : length + n + 1] for n in range(steps)]
                times = [_timed(model, token, cache) for token in one]
                if number:
                    stepped += times
            name = f"at {length} tokens"
            out.append(_seconds(f"prefill {name}, ms", filled, length * samples))
            out.append(_seconds(f"one token {name}, ms", stepped, steps * samples))
            cached = pooled(f"cache {name}, MiB", [(size / 2**20, 1.0)], tokens=length)
            out.append(cached)
    return out


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a cache holds."""
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            items = value.values() if isinstance(value, dict) else [value]
            total += sum(t.element_size() * t.numel() for t in items if isinstance(t, torch.Tensor))
    return total


def _seconds(name: str, taken: Sequence[float], tokens: int) -> Measurement:
    return pooled(name, [(1e3 * x, 1.0) for x in taken], tokens=tokens)


def _timed(model: nn.Module, ids: torch.Tensor, cache: Any) -> float:
    _wait(ids.device)
    began = time.perf_counter()
    last = {"logits_to_keep": 1} if "logits_to_keep" in _names(model) else {}
    model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
    _wait(ids.device)
    return time.perf_counter() - began


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
