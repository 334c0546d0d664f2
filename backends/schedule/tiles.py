"""Finding the tiles a predicate touches, by halving rectangles.

Start from a few rectangles of the (query block, key block) plane. One that is empty is dropped, one
that is full becomes runs of full tiles, any other is cut in four, down to single tiles. The number
of rectangles is about that of the scheduled tiles at the borders, never that of all tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rewriter.backends.schedule.bounds import Bools, Ints, Truth, span, truth
from rewriter.ir.predicate import Term, value

# Tiles that interval arithmetic leaves open are looked into, this many pairs at most in all; any
# beyond it stay partial, which costs time in the kernel and never changes a result.
PAIRS = 1 << 24
_AT_ONCE = 1 << 20
_SAMPLES = 8
_FIRST = 16


@dataclass(frozen=True)
class Plane:
    """Sizes of a schedule: M rows from position `offset`, N keys, blocks of both, heads."""

    M: int
    N: int
    block_q: int
    block_k: int
    heads: int
    offset: int

    @property
    def rows(self) -> int:
        return -(-self.M // self.block_q)

    @property
    def columns(self) -> int:
        return -(-self.N // self.block_k)


@dataclass(frozen=True)
class Runs:
    """Runs of tiles: `row` = head * rows + query block, first key block, how many, all full."""

    row: Ints
    first: Ints
    count: Ints
    full: Bools


@dataclass(frozen=True)
class _Rectangles:
    """Rectangles of one size: `high` query blocks by `wide` key blocks, powers of two."""

    head: Ints
    r: Ints
    c: Ints
    high: int
    wide: int

    def take(self, keep: Bools) -> _Rectangles:
        return _Rectangles(self.head[keep], self.r[keep], self.c[keep], self.high, self.wide)


def find(term: Term, plane: Plane) -> Runs:
    """All tiles that may hold an allowed pair, as runs in no particular order."""
    todo = _start(plane)
    found: list[Runs] = []
    while todo.head.size:
        state = _classify(term, plane, todo)
        found.append(_runs(plane, todo.take(~state.fail), full=True))
        open_ = state.may & state.fail
        rest = todo.take(open_)
        if todo.high == todo.wide == 1:
            settled = Truth(*(x[open_] for x in state))
            found.extend(_leaves(term, plane, rest, settled))
            break
        todo = _cut(plane, rest)
    return Runs(
        np.concatenate([f.row for f in found]),
        np.concatenate([f.first for f in found]),
        np.concatenate([f.count for f in found]),
        np.concatenate([f.full for f in found]),
    )


def _start(plane: Plane) -> _Rectangles:
    """The plane in `_FIRST` by `_FIRST` rectangles or less: the work grows with steps at first."""
    high, wide = (
        max((1 << (n - 1).bit_length()) // _FIRST, 1) for n in (plane.rows, plane.columns)
    )
    head, r, c = np.meshgrid(
        np.arange(plane.heads),
        np.arange(0, plane.rows, high),
        np.arange(0, plane.columns, wide),
        indexing="ij",
    )
    return _Rectangles(head.ravel(), r.ravel(), c.ravel(), high, wide)


def _classify(term: Term, plane: Plane, x: _Rectangles) -> Truth:
    i0 = x.r * plane.block_q
    i1 = np.minimum(i0 + x.high * plane.block_q, plane.M) - 1
    j0 = x.c * plane.block_k
    j1 = np.minimum(j0 + x.wide * plane.block_k, plane.N) - 1
    at = {
        "i": span(i0 + plane.offset, i1 + plane.offset),
        "j": span(j0, j1),
        "h": span(x.head, x.head),
    }
    return Truth(*(np.broadcast_to(part, x.head.shape) for part in truth(term, at)))


def _runs(plane: Plane, x: _Rectangles, full: bool) -> Runs:
    """Every row of every rectangle as one run."""
    r = x.r[:, None] + np.arange(x.high)
    keep = r < plane.rows
    row = (x.head[:, None] * plane.rows + r)[keep]
    first = np.broadcast_to(x.c[:, None], r.shape)[keep]
    count = np.minimum(first + x.wide, plane.columns) - first
    return Runs(row, first, count, np.full(row.shape, full))


def _cut(plane: Plane, x: _Rectangles) -> _Rectangles:
    high, wide = max(x.high // 2, 1), max(x.wide // 2, 1)
    steps = [
        (dr, dc)
        for dr in ((0, high) if x.high > 1 else (0,))
        for dc in ((0, wide) if x.wide > 1 else (0,))
    ]
    r = np.concatenate([x.r + dr for dr, _ in steps])
    c = np.concatenate([x.c + dc for _, dc in steps])
    inside = (r < plane.rows) & (c < plane.columns)
    return _Rectangles(np.tile(x.head, len(steps)), r, c, high, wide).take(inside)


def _leaves(term: Term, plane: Plane, x: _Rectangles, state: Truth) -> list[Runs]:
    """Single tiles that are neither empty nor full for certain."""
    hit, miss = state.hit.copy(), state.miss.copy()
    budget = PAIRS
    for points in (_SAMPLES, max(plane.block_q, plane.block_k)):
        budget = _look(term, plane, x, hit, miss, points, budget)
        if budget < 0:
            # Unknown tiles are visited and masked.
            return [_runs(plane, x, full=False)]
    return [_runs(plane, x.take(hit & miss), full=False), _runs(plane, x.take(~miss), full=True)]


def _look(
    term: Term, plane: Plane, x: _Rectangles, hit: Bools, miss: Bools, points: int, budget: int
) -> int:
    """Evaluate open tiles on a grid of points, every pair if there are enough points.

    Updates `hit` and `miss`; returns what is left of the budget, negative if it did not suffice.
    """
    ask = np.flatnonzero(~(hit & miss))
    rows, columns = _grid(plane.block_q, points), _grid(plane.block_k, points)
    budget -= ask.size * rows.size * columns.size
    if budget < 0:
        return budget
    for part in np.array_split(ask, -(-ask.size * rows.size * columns.size // _AT_ONCE) or 1):
        i = np.minimum(x.r[part, None] * plane.block_q + rows, plane.M - 1) + plane.offset
        j = np.minimum(x.c[part, None] * plane.block_k + columns, plane.N - 1)
        at = {
            "i": torch.from_numpy(i)[:, :, None],
            "j": torch.from_numpy(j)[:, None, :],
            "h": torch.from_numpy(x.head[part])[:, None, None],
        }
        shape = (part.size, rows.size, columns.size)
        seen = value(term, at).expand(shape).flatten(1)
        hit[part] |= seen.any(1).numpy()
        miss[part] |= (~seen).any(1).numpy()
    return budget


def _grid(block: int, points: int) -> Ints:
    if points >= block:
        return np.arange(block, dtype=np.int64)
    return np.linspace(0, block - 1, points).astype(np.int64)
