"""Fit evaluated masks to the mask algebra: a guess counts only if it equals every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from rewriter.ir.mask import Atom, Causal, Chunk, Mask, SymmetricWindow, Window

_EVIDENCE = 3
"""Hidden pairs that make a window or chunk: those of its first two cut rows."""

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


def split_additive(term: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(allowed, finite part) of an additive term; the finite part is 0 where a key is hidden."""
    allowed = term > HIDDEN
    return allowed, torch.where(allowed, term, torch.zeros_like(term))


def fit(evaluations: Sequence[Evaluated], constants: Iterable[int] = ()) -> Mask | None:
    """The simplest mask without padding that equals every evaluation, or None.

    Window and chunk sizes are measured on the evaluations and taken from `constants` (integers
    that occur in the graph); each is then tested on all of them.
    """
    if all(bool(e.allowed.all()) for e in evaluations):
        return Mask()
    offsets = sorted(set(_measured(evaluations)) | set(_nearby(constants)))
    for atoms in _candidates(offsets):
        mask = Mask(atoms)
        if all(torch.equal(mask.dense(e.queries, e.keys), e.allowed) for e in evaluations):
            return mask if _shown(mask, evaluations) else None
    return None


def _shown(mask: Mask, evaluations: Sequence[Evaluated]) -> bool:
    """Whether a local atom hides enough pairs to be believed: one odd pair is no window."""
    if mask.atoms == (Causal(),):
        return True
    whole = Mask((Causal(),)) if mask.causal else Mask()
    hidden = sum(int((whole.dense(e.queries, e.keys) & ~e.allowed).sum()) for e in evaluations)
    return hidden >= _EVIDENCE


def _candidates(sizes: Sequence[int]) -> Iterator[tuple[Atom, ...]]:
    """Conjunctions to try, simplest first; of equal ones the smallest size first."""
    local: list[tuple[Atom, ...]] = [()]
    local.extend((Window(s),) for s in sizes)
    local.extend((SymmetricWindow(s),) for s in sizes)
    local.extend((Chunk(s),) for s in sizes)
    yield (Causal(),)
    yield from local[1:]
    for first, rest in product([(Causal(),)], local[1:]):
        yield (*first, *rest)


def _measured(evaluations: Sequence[Evaluated]) -> Iterator[int]:
    """Sizes that the visible band itself shows: its reach backwards, and its first break."""
    for e in evaluations:
        distance = e.queries[:, None] - e.keys[None, :]
        visible = distance[e.allowed]
        if visible.numel():
            reach = int(visible.max())
            yield from (s for s in (reach, reach + 1) if s > 0)
        row = e.allowed[e.queries == 0]
        if row.numel() and bool(row[0].any()):
            yield int(e.keys[row[0]].max()) + 1


def _nearby(constants: Iterable[int]) -> Iterator[int]:
    for c in constants:
        for size in (c - 1, c, c + 1, c // 2 - 1, c // 2, c // 2 + 1):
            if size > 0:
                yield size


def lengths_to_probe(constants: Iterable[int], largest: int) -> tuple[int, ...]:
    """Two generic lengths and those at which a size among `constants` would show."""
    out = {11, 26}
    for c in constants:
        if c <= largest:
            out |= {max(c - 1, 2), c, c + 1, c + 2, 2 * c + 3}
    return tuple(sorted(out))


def positions_to_sample(constants: Iterable[int]) -> torch.Tensor:
    """Positions whose differences meet every size near `constants`, sorted, int64."""
    out = {0, 1, 2, 3, 7}
    for c in constants:
        for base in (c // 2, c, 2 * c):
            out |= {max(base + d, 0) for d in (-2, -1, 0, 1, 2)}
        out.add(3 * c + 1)
    return torch.tensor(sorted(out))
