"""Fit evaluated masks to the mask algebra: a guess counts only if it equals every evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rewriter.ir.mask import (
    Atom,
    BlockCausal,
    Causal,
    CausalOrPrefix,
    Chunk,
    Dilated,
    Mask,
    SymmetricWindow,
    Window,
    WindowOrSinks,
    WindowOrStride,
)

_EVIDENCE = 3
"""Pairs that an atom hides and no other: those of the first two cut rows of a window."""

_LARGE, _ENDS, _ROWS = 1 << 18, 48, 512
"""Pairs above which rows are left out at first, rows kept at each end, rows compared at once."""

HIDDEN = -1e4
"""Additive values at or below this hide a key: models use -1e4, the dtype's least, or -inf."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a mask.

    Attributes:
        allowed: (Nq, Nk) bool.
        queries, keys: (Nq,) and (Nk,) int64, the positions that rows and columns stand for.
    """

    allowed: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def dense(cls, allowed: torch.Tensor) -> Evaluated:
        """All positions 0, 1, 2, ... of (Nq, Nk)."""
        return cls(allowed, torch.arange(allowed.shape[0]), torch.arange(allowed.shape[1]))

    def thinned(self) -> Evaluated:
        """Fewer rows of a large one: enough to choose atoms by, which `shows` then confirms."""
        rows = self.allowed.shape[0]
        if self.allowed.numel() <= _LARGE:
            return self
        at = {
            *range(min(_ENDS, rows)),
            *range(max(rows - _ENDS, 0), rows),
            *range(0, rows, max(rows // _ENDS, 1)),
        }
        chosen = torch.tensor(sorted(at))
        return Evaluated(self.allowed[chosen], self.queries[chosen], self.keys)

    def shows(self, mask: Mask) -> bool:
        """Whether a mask is this evaluation, pair by pair."""
        pieces = [slice(at, at + _ROWS) for at in range(0, self.allowed.shape[0], _ROWS)]
        return all(
            torch.equal(mask.dense(self.queries[p], self.keys), self.allowed[p]) for p in pieces
        )


def split_additive(term: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(allowed, finite part) of an additive term; the finite part is 0 where a key is hidden."""
    allowed = term > HIDDEN
    return allowed, torch.where(allowed, term, torch.zeros_like(term))


def fit(evaluations: Sequence[Evaluated], constants: Iterable[int] = ()) -> Mask | None:
    """The simplest mask without padding that equals every evaluation, or None.

    Every atom that hides nothing visible is collected, at the tightest size the evaluations allow;
    if all of them together are the mask, those that the others imply are dropped.
    """
    if all(bool(e.allowed.all()) for e in evaluations):
        return Mask()
    whole, evaluations = evaluations, [e.thinned() for e in evaluations]
    known = [_Known(a, evaluations) for a in _candidates(evaluations, constants)]
    known = [k for k in known if k.implied and k.hides]
    kept = list(known)
    if not _equal(kept, evaluations):
        return None
    for item in known:  # the least simple first
        rest = [k for k in kept if k is not item]
        if rest and _equal(rest, evaluations):
            kept = rest
    kept.reverse()
    if not all(_shown(item, kept, evaluations) for item in kept):
        return None
    if not all(_crossed(item.atom, evaluations) for item in kept):
        return None
    mask = Mask(tuple(k.atom for k in kept))
    return mask if all(e.shows(mask) for e in whole) else None


class _Known:
    """An atom and what it allows on every evaluation."""

    def __init__(self, atom: Atom, evaluations: Sequence[Evaluated]) -> None:
        self.atom = atom
        self.allowed: list[torch.Tensor] = []
        self.implied, self.hides = True, False
        for e in evaluations:
            allowed = Mask((atom,)).dense(e.queries, e.keys)
            if bool((e.allowed & ~allowed).any()):
                self.implied = False
                return
            self.hides = self.hides or not bool(allowed.all())
            self.allowed.append(allowed)


def _equal(atoms: Sequence[_Known], evaluations: Sequence[Evaluated]) -> bool:
    for at, e in enumerate(evaluations):
        together = torch.ones_like(e.allowed)
        for item in atoms:
            together = together & item.allowed[at]
        if not torch.equal(together, e.allowed):
            return False
    return True


def _shown(item: _Known, kept: Sequence[_Known], evaluations: Sequence[Evaluated]) -> bool:
    """Whether an atom hides enough pairs alone to be believed: one odd pair is no window."""
    if isinstance(item.atom, Causal):
        return True
    hidden = 0
    for at in range(len(evaluations)):
        alone = ~item.allowed[at]
        for other in kept:
            if other is not item:
                alone = alone & other.allowed[at]
        hidden += int(alone.sum())
    return hidden >= _EVIDENCE


def _crossed(atom: Atom, evaluations: Sequence[Evaluated]) -> bool:
    """Whether a pair just past an atom's limit was evaluated.

    Where the next larger distance among all pairs is a much larger one, the limit may lie anywhere
    between, and the tightest size that fits is a guess.
    """
    limit = 0
    match atom:
        case Window(size) | WindowOrSinks(size, _):
            limit = size
        case WindowOrStride(size, step):
            limit = size if size % step else size + 1
        case SymmetricWindow(radius):
            limit = radius + 1
    return not limit or any(bool((e.queries[:, None] - e.keys == limit).any()) for e in evaluations)


def _candidates(evaluations: Sequence[Evaluated], constants: Iterable[int]) -> Iterator[Atom]:
    """Atoms that may hold, the least simple first; of one kind the loosest first."""
    sizes = sorted({s for s in (*_measured(evaluations), *_nearby(constants)) if s > 1})
    seen = [_Distances.of(e) for e in evaluations]
    for step in sizes:
        reach = max(d.reach(d.values % step != 0) for d in seen)
        if reach > 0:
            yield WindowOrStride(reach + 1, step)
    for sinks in sorted({1, *sizes}, reverse=True):
        reach = max(d.reach(d.keys >= sinks) for d in seen)
        if reach >= 0:
            yield WindowOrSinks(reach + 1, sinks)
    prefix = max(d.prefix for d in seen)
    if prefix > 0:
        yield CausalOrPrefix(prefix)
    yield from (BlockCausal(s) for s in reversed(sizes))
    step = math.gcd(*(d.step for d in seen))
    if step > 1:
        yield Dilated(step)
    yield from (Chunk(s) for s in reversed(sizes))
    yield SymmetricWindow(max(int(np.abs(d.values).max(initial=0)) for d in seen))
    yield Window(max(max(d.reach(), 0) for d in seen) + 1)
    yield Causal()


@dataclass(frozen=True)
class _Distances:
    """Of the visible pairs of one evaluation: i - j, and j."""

    values: np.ndarray[Any, np.dtype[np.int64]]
    keys: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, e: Evaluated) -> _Distances:
        i, j = e.allowed.nonzero().unbind(-1)
        keys = e.keys[j]
        return cls((e.queries[i] - keys).numpy(), keys.numpy())

    def reach(self, among: Any = slice(None)) -> int:
        """The largest distance, -1 if nothing reaches back."""
        return int(self.values[among].max(initial=-1))

    @property
    def prefix(self) -> int:
        """Keys up to here are seen from before."""
        return int(self.keys[self.values < 0].max(initial=-1)) + 1

    @property
    def step(self) -> int:
        """The greatest common divisor of all distances."""
        return int(np.gcd.reduce(self.values))


def _measured(evaluations: Sequence[Evaluated]) -> Iterator[int]:
    """Sizes that the mask itself shows: where the first row, column and the last row break."""
    for e in evaluations:
        row, column = e.allowed[e.queries == 0], e.allowed[:, e.keys == 0].T
        for line, at in ((row, e.keys), (column, e.queries)):
            if line.numel() and bool(line[0].any()):
                yield int(at[line[0]].max()) + 1
        if e.allowed.numel():
            hidden = (~e.allowed[-1]).nonzero()
            if hidden.numel():
                yield int(e.keys[hidden[0, 0]])


def _nearby(constants: Iterable[int]) -> Iterator[int]:
    for c in constants:
        for size in (c - 1, c, c + 1, c // 2 - 1, c // 2, c // 2 + 1):
            if size > 0:
                yield size


def lengths_to_probe(constants: Iterable[int], largest: int) -> tuple[int, ...]:
    """Two generic lengths and those at which a size among `constants` would show.

    One more is behind the largest product of two of them: blocks of blocks repeat there.
    """
    sizes = {c for c in constants if 0 < c <= largest}
    out = {11, 26}
    for c in sizes:
        out |= {max(c - 1, 2), c, c + 1, c + 2, 2 * c + 3}
    behind = (a * b + max(a, b) + 2 for a in sizes for b in sizes if min(a, b) > 1)
    out |= {max((n for n in behind if n <= largest), default=11)}
    return tuple(sorted(out))


def positions_to_sample(constants: Iterable[int]) -> torch.Tensor:
    """Positions whose differences meet every size near `constants`, sorted, int64."""
    out = {0, 1, 2, 3, 7}
    for c in constants:
        for base in (c // 2, c, 2 * c):
            out |= {max(base + d, 0) for d in (-2, -1, 0, 1, 2)}
        out.add(3 * c + 1)
    return torch.tensor(sorted(out))
