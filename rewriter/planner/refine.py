"""Local search on measured scores: exchange choices, keep what helps, measure everything.

Slopes at the present assignment rank the exchanges; each one is then measured on fixed probes,
since slopes and sensitivities only guess.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rewriter.planner.objective import Objective, Score
from rewriter.planner.relax import slopes
from rewriter.planner.space import SearchSpace

Picks = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """An assignment with its measured score."""

    picks: Picks
    score: Score
    value: float


class Judge:
    """Measures assignments on fixed probes, each one once."""

    def __init__(self, space: SearchSpace, objective: Objective, draws: range):
        self.space = space
        self.objective = objective
        self.draws = draws
        self._known: dict[Picks, Measured] = {}

    def __call__(self, picks: Sequence[int]) -> Measured:
        key = tuple(picks)
        if key not in self._known:
            self.space.use(key)
            score = self.objective.score(self.space.model, self.draws)
            self._known[key] = Measured(key, score, self.objective.value(score))
        return self._known[key]

    @property
    def measured(self) -> list[Measured]:
        """Everything measured so far, best first."""
        return sorted(self._known.values(), key=lambda m: m.value)


def refine(
    judge: Judge,
    start: Picks,
    budget: float,
    *,
    trials: int,
    spread: int = 8,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure up to `trials` exchanges, always from the best assignment so far.

    Args:
        spread: exchanges tried from one ranking before the slopes are taken again.
        seed: of the random exchanges that are tried between ranked ones.
    """
    best = judge(start)
    rng = random.Random(seed)
    tried = 0
    seen = {best.picks}
    while tried < trials:
        ranked = iter(_ranked(judge, best.picks, budget, seen))
        moved = False
        for _ in range(min(spread, trials - tried)):
            picks = next(ranked, None)
            if picks is None:
                picks = _random_exchange(judge.space, best.picks, budget, rng, seen)
            if picks is None:
                return best
            seen.add(picks)
            tried += 1
            found = judge(picks)
            if found.value < best.value:
                best, moved = found, True
                note(
                    f"exchange {tried} of {trials}: copy perplexity "
                    f"{best.score.copy_perplexity:.3f}, perplexity {best.score.perplexity:.2f}"
                )
                break
        if not moved and tried < trials:
            picks = _random_exchange(judge.space, best.picks, budget, rng, seen)
            if picks is None:
                return best
            seen.add(picks)
            tried += 1
            best = min(best, judge(picks), key=lambda m: m.value)
    return best


def _ranked(judge: Judge, picks: Picks, budget: float, seen: set[Picks]) -> list[Picks]:
    """Exchanges that the slopes expect to help, best first."""
    slope = slopes(judge.space, judge.objective, picks, judge.draws)
    options = []
    for changed in _exchanges(judge.space, picks, budget):
        if changed in seen:
            continue
        gain = sum(
            row[new] - row[old]
            for row, old, new in zip(slope, picks, changed, strict=True)
            if old != new
        )
        options.append((gain, changed))
    return [changed for _, changed in sorted(options)]


def _exchanges(space: SearchSpace, picks: Picks, budget: float) -> Iterator[Picks]:
    """All assignments within the budget that differ in one site or in two."""
    moves = [
        (site, pick)
        for site, row in enumerate(space.candidates)
        for pick in range(len(row))
        if pick != picks[site]
    ]
    for count in (1, 2):
        for chosen in itertools.combinations(moves, count):
            if len({site for site, _ in chosen}) < count:
                continue
            changed = list(picks)
            for site, pick in chosen:
                changed[site] = pick
            if space.cost(changed) <= budget + 1e-9:
                yield tuple(changed)


def _random_exchange(
    space: SearchSpace, picks: Picks, budget: float, rng: random.Random, seen: set[Picks]
) -> Picks | None:
    fresh = [p for p in _exchanges(space, picks, budget) if p not in seen]
    return rng.choice(fresh) if fresh else None
