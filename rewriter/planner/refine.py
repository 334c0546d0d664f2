"""Local search on measured scores: exchange choices, keep what helps, measure everything.

Slopes at the present assignment rank the exchanges; each one is then measured on fixed probes,
since slopes and sensitivities only guess.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

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
    """Measures assignments on fixed probes, each probe of an assignment once."""

    def __init__(self, space: SearchSpace, objective: Objective, draws: range):
        self.space = space
        self.objective = objective
        self.draws = draws
        self._known: dict[Picks, Measured] = {}
        self._scores: dict[Picks, list[Score]] = {}

    def __call__(self, picks: Sequence[int]) -> Measured:
        """On all probes."""
        key = tuple(picks)
        while key not in self._known:
            self._probe(key)
        return self._known[key]

    def beats(self, picks: Sequence[int], best: Picks) -> Measured | None:
        """The measurement of an assignment that is better than a measured one, else None.

        Both see the same probes, so their differences decide: it is given up as soon as the mean
        difference is larger than its standard error.
        """
        key, than = tuple(picks), self._scores[best]
        while key not in self._known:
            scores = self._probe(key)
            worse = [
                self.objective.value(a) - self.objective.value(b)
                for a, b in zip(scores, than, strict=False)
            ]
            if len(worse) > 1 and mean(worse) > stdev(worse) / math.sqrt(len(worse)):
                return None
        found = self._known[key]
        return found if found.value < self._known[best].value else None

    def _probe(self, key: Picks) -> list[Score]:
        """One more probe; the assignment is known after the last."""
        scores = self._scores.setdefault(key, [])
        draw = self.draws[len(scores)]
        self.space.use(key)
        scores.append(self.objective.score(self.space.model, range(draw, draw + 1)))
        if len(scores) == len(self.draws):
            score = Score(mean(s.text for s in scores), mean(s.copy for s in scores))
            self._known[key] = Measured(key, score, self.objective.value(score))
        return scores

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
    allowed: Callable[[Picks], bool] = lambda picks: True,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure up to `trials` exchanges, always from the best assignment so far.

    Args:
        spread: exchanges tried from one ranking before the slopes are taken again.
        seed: of the random exchanges that are tried between ranked ones.
        allowed: whether an assignment meets all other constraints.
    """
    best = judge(start)
    rng = random.Random(seed)
    space = judge.space

    def within(picks: Picks) -> bool:
        return space.cost(picks) <= budget + 1e-9 * max(1.0, abs(budget)) and allowed(picks)

    tried = 0
    seen = {best.picks}
    turn = 0
    while tried < trials:
        # two probes of the fixed ones rank, others the next time: slopes only guess anyway
        some = range(judge.draws[turn], judge.draws[min(turn + 1, len(judge.draws) - 1)] + 1)
        turn = (turn + 2) % len(judge.draws)
        ranked = iter(_ranked(judge, best.picks, some, within, seen))
        moved = False
        for _ in range(min(spread, trials - tried)):
            picks = next(ranked, None)
            if picks is None:
                picks = _random_exchange(space, best.picks, within, rng, seen)
            if picks is None:
                return best
            seen.add(picks)
            tried += 1
            found = judge.beats(picks, best.picks)
            if found is not None:
                best, moved = found, True
                note(
                    f"exchange {tried} of {trials}: copy perplexity "
                    f"{best.score.copy_perplexity:.3f}, perplexity {best.score.perplexity:.2f}"
                )
                break
        if not moved and tried < trials:
            picks = _random_exchange(space, best.picks, within, rng, seen)
            if picks is None:
                return best
            seen.add(picks)
            tried += 1
            best = judge.beats(picks, best.picks) or best
    return best


def _ranked(
    judge: Judge,
    picks: Picks,
    draws: range,
    within: Callable[[Picks], bool],
    seen: set[Picks],
) -> list[Picks]:
    """Exchanges that the slopes expect to help, best first."""
    slope = slopes(judge.space, judge.objective, picks, draws)
    options = []
    for changed in _exchanges(judge.space, picks, within):
        if changed in seen:
            continue
        gain = sum(
            row[new] - row[old]
            for row, old, new in zip(slope, picks, changed, strict=True)
            if old != new
        )
        options.append((gain, changed))
    return [changed for _, changed in sorted(options)]


def _exchanges(
    space: SearchSpace, picks: Picks, within: Callable[[Picks], bool]
) -> Iterator[Picks]:
    """All allowed assignments that differ in one site or in two."""
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
            if within(tuple(changed)):
                yield tuple(changed)


def _random_exchange(
    space: SearchSpace,
    picks: Picks,
    within: Callable[[Picks], bool],
    rng: random.Random,
    seen: set[Picks],
) -> Picks | None:
    fresh = [p for p in _exchanges(space, picks, within) if p not in seen]
    return rng.choice(fresh) if fresh else None
