"""The block schedule of a predicate in a layout that generated kernels read directly.

    for query block r of head h:  for t in starts[h, r] .. starts[h, r + 1]:  visit blocks[t]

Made in closed form from the predicate: the cost grows with the number of scheduled tiles.
Catalogue: sparse.md section 1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sympy.logic.boolalg import Boolean

from rewriter.backends.schedule.tiles import Plane, Runs, find
from rewriter.ir.predicate import lower


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tiles in compressed rows. Shared between calls: never write to the tensors.

    Attributes:
        starts: (1 | heads, ceil(M / block_q) + 1) int32, offsets into `blocks`; the head axis has
            size 1 when the predicate does not depend on the head.
        blocks: (tiles,) int32 key block numbers, ascending in each row.
        full: (tiles,) uint8, 1 if every pair (i, j) of the tile with row < M and j < N is allowed.
        M, N: rows and keys.
        heads: number of query heads served.
        block_q, block_k: size of a tile.
        offset: position of row 0.
    """

    starts: torch.Tensor
    blocks: torch.Tensor
    full: torch.Tensor
    M: int
    N: int
    heads: int
    block_q: int
    block_k: int
    offset: int = 0


@dataclass(frozen=True)
class Work:
    """What a kernel visits, summed over heads: tiles, those that are full, and (i, j) pairs."""

    tiles: int
    full: int
    pairs: int


@lru_cache(maxsize=128)
def schedule(
    mask: Boolean, M: int, N: int, heads: int, block_q: int, block_k: int, offset: int = 0
) -> Schedule:
    """The tiles of `block_q` rows by `block_k` keys that hold an allowed pair.

    Args:
        mask: sympy predicate over (h, i, j).
        M, N: number of query rows and keys; i runs from `offset` to `offset + M - 1`.
        heads: query heads.
        block_q, block_k: size of a tile.
        offset: position of row 0.

    Raises:
        ValueError: the predicate holds something that cannot be evaluated, or a size is not
            positive.
    """
    if min(M, N, heads, block_q, block_k) < 1 or offset < 0:
        raise ValueError("a schedule needs positive sizes and an offset that is not negative")
    term = lower(mask)
    plane = Plane(M, N, block_q, block_k, heads if "h" in term.names else 1, offset)
    starts, blocks, full = _compress(find(term, plane), plane)
    return Schedule(
        torch.from_numpy(starts),
        torch.from_numpy(blocks),
        torch.from_numpy(full),
        *(M, N, heads, block_q, block_k, offset),
    )


def _compress(runs: Runs, plane: Plane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.argsort(runs.row * plane.columns + runs.first)
    row, first, count = runs.row[order], runs.first[order], runs.count[order]
    ends = count.cumsum()
    total = int(ends[-1]) if ends.size else 0
    blocks = np.arange(total) + np.repeat(first - (ends - count), count)
    per_row = np.zeros(plane.heads * plane.rows + 1, dtype=np.int64)
    np.add.at(per_row, row + 1, count)
    offsets = per_row.cumsum()
    # Each head repeats the end of the one before as its own start.
    at = np.arange(plane.heads)[:, None] * plane.rows + np.arange(plane.rows + 1)
    full = np.repeat(runs.full[order], count)
    return offsets[at].astype(np.int32), blocks.astype(np.int32), full.astype(np.uint8)


@lru_cache(maxsize=128)
def transpose(schedule: Schedule) -> Schedule:
    """The same tiles by key block: `starts` over key blocks, `blocks` the query blocks.

    M, N and the block sizes keep their meaning. Backward kernels for keys and values read this.
    """
    heads, rows = schedule.starts.shape[0], schedule.starts.shape[1] - 1
    columns = -(-schedule.N // schedule.block_k)
    starts = schedule.starts.numpy().astype(np.int64)
    per_row = np.diff(starts, axis=1).reshape(-1)
    row = np.repeat(np.arange(heads * rows), per_row)
    line = row // rows * columns + schedule.blocks.numpy()
    order = np.argsort(line, kind="stable")
    offsets = np.concatenate(([0], np.bincount(line, minlength=heads * columns).cumsum()))
    at = np.arange(heads)[:, None] * columns + np.arange(columns + 1)
    return Schedule(
        torch.from_numpy(offsets[at].astype(np.int32)),
        torch.from_numpy((row[order] % rows).astype(np.int32)),
        torch.from_numpy(schedule.full.numpy()[order]),
        *(schedule.M, schedule.N, schedule.heads),
        *(schedule.block_q, schedule.block_k, schedule.offset),
    )


def work(schedule: Schedule) -> Work:
    """Tiles and pairs that a kernel visits on this schedule, for cost models."""
    starts = schedule.starts.long()
    rows = starts.shape[1] - 1
    last = schedule.blocks == -(-schedule.N // schedule.block_k) - 1
    short = -(-schedule.N // schedule.block_k) * schedule.block_k - schedule.N
    keys = torch.cat((last.new_zeros(1), last)).long().cumsum(0)
    width = starts.diff(dim=1) * schedule.block_k - keys[starts].diff(dim=1) * short
    height = torch.full((rows,), schedule.block_q)
    height[-1] = schedule.M - (rows - 1) * schedule.block_q
    copies = schedule.heads // starts.shape[0]
    return Work(
        copies * schedule.blocks.numel(),
        copies * int(schedule.full.sum()),
        copies * int((width * height).sum()),
    )
