"""Which code is faster for a linear layer on this machine: measured once, remembered on disk.

A decision holds for a dtype, the sizes of the weight, a range of row counts and a number of
threads. It is taken the first time such a call is made, on a slice of the weight that costs a
fraction of a second, and kept in the user's cache directory. Generated code is chosen only where
it gives the same values and was faster.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewriter.backends.cache import VARIABLE as CACHE
from rewriter.backends.cpu import linear as generated
from rewriter.backends.measured import remembered
from rewriter.backends.ops.choice import VARIABLE, switched_on
from rewriter.timing import interleaved

Winner = Literal["generated", "stock"]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # upper ends of the ranges; then one without end
_WORK = 1e9  # operations of one timed call
_RUNS = 5
_MARGIN = 0.98  # share of the stock time that generated code has to stay under
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Winner:
    """Which code serves F.linear(x, weight, bias): CPU tensors of one dtype that kernels know."""
    return "generated" if is_better(seconds(weight, math.prod(x.shape[:-1]))) else "stock"


def is_better(measured: tuple[float, float]) -> bool:
    ours, theirs = measured
    return ours < _MARGIN * theirs


def seconds(weight: Tensor, rows: int) -> tuple[float, float]:
    """Measured seconds of generated and of stock code for `rows` rows of input.

    Args:
        weight: (N, K), as torch's linear takes it.

    Returns:
        Of a slice of the work; inf for generated code that cannot run or gives other values.
    """
    top = next((top for top in ROWS if rows <= top), 2 * ROWS[-1])
    N, K = weight.shape
    where = (os.environ.get(VARIABLE), os.environ.get(CACHE), generated.precision(weight.dtype))
    threads = torch.get_num_threads()
    return _seconds(weight.dtype, N, K, top, weight.stride(1) != 1, threads, where)


@lru_cache(maxsize=4096)
def _seconds(
    dtype: torch.dtype,
    N: int,
    K: int,
    rows: int,
    transposed: bool,
    threads: int,
    where: tuple[str | None, str | None, str],
) -> tuple[float, float]:
    if not switched_on("cpu", where[0]):
        return math.inf, 0.0
    if min(N, K) == 0 or isinstance(generated.find(dtype), str):
        return math.inf, 0.0
    name = f"{dtype} {N} x {K} rows {rows} transposed {transposed} threads {threads} {where[2]}"
    ours, theirs = remembered(
        "linear",
        generated.source_of(torch.float32),
        name,
        lambda: _measure(dtype, N, K, rows, transposed),
    )
    return ours, theirs


def _measure(
    dtype: torch.dtype, N: int, K: int, rows: int, transposed: bool
) -> tuple[float, float]:
    """Median seconds of generated and stock code, interleaved; inf where the values differ."""
    columns = min(N, max(128, int(_WORK / (2 * rows * K))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    weight = torch.randn(columns, K, generator=generator).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    with torch.no_grad():
        ours, theirs = generated.forward(x, weight, None), F.linear(x, weight)
        scale = float(theirs.abs().max())
        if float((ours.float() - theirs.float()).abs().max()) > _TOLERANCE[dtype] * scale:
            return math.inf, 0.0
        times = interleaved(
            {
                "generated": lambda: generated.forward(x, weight, None),
                "stock": lambda: F.linear(x, weight),
            },
            seconds=0.0,
            rounds=(_RUNS, _RUNS),
            clock="cpu" if torch.get_num_threads() == 1 else "wall",
        )
    return times["generated"].median, times["stock"].median
