"""float32 attention and gradients of bfloat16 attention: on vectors or on tile registers.

A float32 number is three of bfloat16 on tiles.
Tiles multiply faster and have to be filled first, so they win where a row sees many keys and a key
is seen by many rows. From how many on is measured once, on causal attention, and remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from rewriter.backends.inputs import BlockSparseInputs
from rewriter.backends.measured import remembered
from rewriter.backends.schedule import schedule, work
from rewriter.ir.block_sparse import BlockSparse
from rewriter.timing import interleaved

SAMPLE = BlockSparse(64, 64, 0.125)  # what is measured
LENGTHS = (256, 512, 1024, 2048)
FEW = 128  # keys of a row up to which it is always vectors: nothing has to be measured
_HEADS = 4
_RUNS = 5
_MARGIN = 0.95  # share of the time on vectors that tiles have to stay under
_WASTE = 1.25  # numbers of a tile for each number of a head
_BLOCK = 64
Form = Callable[[BlockSparseInputs], object]


def least_keys(source: str, dtype: torch.dtype, vectors: Form, tiles: Form) -> float:
    """Keys that a row has to see on average for tiles to be faster; inf where they never are.

    Args:
        source: text of the generated code of both forms.
        dtype: of the inputs.
        vectors, tiles: run a call of `SAMPLE` in that form.
    """

    def measure() -> list[float]:
        draw = torch.Generator().manual_seed(0)
        times: list[float] = []
        for n in LENGTHS:
            q, k, v = (torch.rand(1, _HEADS, n, 64, generator=draw).to(dtype) for _ in range(3))
            x = BlockSparseInputs(q, k, v)
            taken = interleaved(
                {"vectors": lambda x=x: vectors(x), "tiles": lambda x=x: tiles(x)},  # type: ignore[misc]
                seconds=0.0,
                rounds=(_RUNS, _RUNS),
                clock="cpu" if torch.get_num_threads() == 1 else "wall",
            )
            times += [taken["vectors"].median, taken["tiles"].median]
        return times

    times = remembered("attention", source, f"causal {str(dtype)[6:]}", measure)
    least = math.inf
    for n, slow, fast in reversed(list(zip(LENGTHS, times[::2], times[1::2], strict=True))):
        if fast >= _MARGIN * slow:
            break
        least = n / 2
    return least


def fits(spec: BlockSparse) -> bool:
    """Whether the heads of a spec fill tiles of 32 numbers well."""
    widths = spec.key_dim, spec.value_dim
    return sum(-(-n // 32) * 32 for n in widths) <= _WASTE * sum(widths) and spec.block % 32 == 0


def keys_seen(spec: BlockSparse, x: BlockSparseInputs) -> float:
    """Keys that a row sees on average, or rows of a group of heads that see a key if it is less."""
    (H, M), (Hkv, N) = x.q.shape[1:3], x.k.shape[1:3]
    most = min(float(N), M * H / Hkv)
    if most < FEW:
        return most
    if x.blocks is not None:
        seen = float(min(N, x.blocks.shape[-1] * spec.block))
    else:
        seen = _seen(spec, M, N, H)
    return min(seen, seen * M * H / (N * Hkv))


@lru_cache(maxsize=256)
def _seen(spec: BlockSparse, M: int, N: int, heads: int) -> float:
    return work(schedule(spec.mask, M, N, heads, _BLOCK, _BLOCK, spec.offset)).pairs / (heads * M)
