"""Rotary embedding by whichever is faster: torch's operations or one generated kernel.

No operator of its own: under autograd, in compiled, exported and mapped code the formula runs, as
operations of torch.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cache import VARIABLE as CACHE
from rewriter.backends.cpu import rotary as generated
from rewriter.backends.measured import remembered
from rewriter.backends.ops.choice import VARIABLE, switched_on
from rewriter.backends.ops.eager import unwatched
from rewriter.backends.ops.regions import plain
from rewriter.timing import interleaved

TOKENS = (16, 64, 256)  # what is measured; fewer tokens take the formula
_HEADS = 4
_RUNS = 5
_MARGIN = 0.95  # share of the formula's time that the kernel has to stay under


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-second half of x, first half of x) * sin.

    Args:
        x: (..., T, D), D even.
        cos, sin: broadcast to x.
    """
    if torch.compiler.is_compiling() or not _served(x, cos, sin):
        return formula(x, cos, sin)
    return generated.forward(x, cos, sin)


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as operations of torch."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _served(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if x.dim() != 4 or x.shape[-2] < TOKENS[0] or x.shape[-1] % 2:
        return False
    if not plain(x, cos, sin) or not unwatched(x, cos, sin):
        return False
    batch, _, tokens, width = x.shape
    fits = all(t.dim() == 4 and t.shape[0] in (1, batch) and t.shape[1] == 1 for t in (cos, sin))
    if not fits or any(t.shape[2:] != (tokens, width) for t in (cos, sin)):
        return False
    where = os.environ.get(VARIABLE), os.environ.get(CACHE)
    return tokens >= _least_tokens(x.dtype, width, torch.get_num_threads(), where)


@lru_cache(maxsize=256)
def _least_tokens(
    dtype: torch.dtype, width: int, threads: int, where: tuple[str | None, str | None]
) -> float:
    """Tokens from which on the kernel was measured to be faster; inf where it never is."""
    if not switched_on("cpu", where[0]) or isinstance(generated.find(dtype), str):
        return math.inf

    def measure() -> list[float]:
        draw = torch.Generator().manual_seed(0)
        times: list[float] = []
        for tokens in TOKENS:
            x = torch.rand(1, tokens, _HEADS, width, generator=draw).to(dtype).transpose(1, 2)
            cos, sin = (torch.rand(1, 1, tokens, width, generator=draw).to(dtype) for _ in "ab")
            taken = interleaved(
                {
                    "kernel": lambda x=x, c=cos, s=sin: generated.forward(x, c, s),  # type: ignore[misc]
                    "formula": lambda x=x, c=cos, s=sin: formula(x, c, s),  # type: ignore[misc]
                },
                seconds=0.0,
                rounds=(_RUNS, _RUNS),
                clock="cpu" if threads == 1 else "wall",
            )
            times += [taken["kernel"].median, taken["formula"].median]
        return times

    name = f"{dtype} {width} threads {threads}"
    times = remembered("rotary", generated.source_of(dtype), name, measure)
    least = math.inf
    for tokens, ours, theirs in reversed(list(zip(TOKENS, times[::2], times[1::2], strict=True))):
        if ours >= _MARGIN * theirs:
            break
        least = tokens
    return least
