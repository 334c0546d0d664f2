"""Local search on measured scores: exchange choices, keep what helps, measure everything.

Single changes of the present assignment are measured on a few probes, whether they fit the budget
or not. Sums of two rank the exchanges; each promising one is then measured on all probes, since
effects do not add up.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from rewriter.planner.blocks import Outputs, SharedBlocks
from rewriter.planner.journal import Journal
from rewriter.planner.objective import Objective, Score
from rewriter.planner.space import SearchSpace

Picks = tuple[int, ...]
Move = tuple[int, int]  # a site and the number of its new candidate


@dataclass(frozen=True)
class Measured:
    """An assignment with its measured score."""

    picks: Picks
    score: Score
    value: float


class Judge:
    """Measures assignments on fixed probes, each probe of an assignment once.

    Assignments share the layers before the first site in which they differ from `base`.
    """

    def __init__(
        self,
        space: SearchSpace,
        objective: Objective,
        draws: range,
        journal: Journal | None = None,
    ):
        self.space = space
        self.objective = objective
        self.draws = draws
        self.base: Picks | None = None
        self._shared = SharedBlocks(space.model, space.sites)
        self._kept: dict[int, Outputs] = {}  # of the base, by draw
        self._fresh: tuple[Picks | None, dict[int, Outputs]] = None, {}  # of the latest
        self._scores: dict[Picks, dict[int, Score]] = {}
        self._journal = journal
        for (picks, draw), score in journal.scores.items() if journal is not None else ():
            self._scores.setdefault(picks, {})[draw] = score

    def __call__(self, picks: Sequence[int]) -> Measured:
        """On all probes."""
        key = tuple(picks)
        value = self.value(key, self.draws)
        return Measured(key, self.score(key, self.draws), value)

    def score(self, picks: Picks, draws: Sequence[int]) -> Score:
        """Mean over some probes."""
        return Score.over([self._probe(picks, draw) for draw in draws])

    def value(self, picks: Picks, draws: Sequence[int]) -> float:
        """The objective's value on some probes."""
        exact = None
        if self.objective.limit is not None:
            exact = self.score(self.space.exact, draws)
        # the assignment itself comes last: what it gave may be shared
        return self.objective.value(self.score(picks, draws), exact)

    def start_from(self, picks: Picks) -> None:
        """Make a measured assignment the base."""
        latest, fresh = self._fresh
        self.base, self._kept = picks, fresh if latest == picks else {}

    def beats(self, picks: Picks, best: Picks) -> Measured | None:
        """The measurement of an assignment that is better than a measured one, else None.

        Both see the same probes, so their differences decide: it is given up as soon as the mean
        difference is larger than its standard error.
        """
        worse: list[float] = []
        for count, draw in enumerate(self.draws, start=1):
            one, other = (self.objective.value(self._probe(p, draw)) for p in (picks, best))
            worse.append(one - other)
            seen = self.draws[:count]
            gap = self.value(picks, seen) - self.value(best, seen)
            if count > 1 and gap > stdev(worse) / math.sqrt(count):
                return None
        return self(picks) if gap < 0 else None

    def _probe(self, key: Picks, draw: int) -> Score:
        scores = self._scores.setdefault(key, {})
        if draw not in scores:
            first, before = 0, self._kept.get(draw, {})
            if self.base is not None:
                pairs = zip(key, self.base, strict=True)
                first = next((n for n, (a, b) in enumerate(pairs) if a != b), len(key))
            self.space.use(key)
            with self._shared.reused(before, first) as fresh:
                scores[draw] = self.objective.score(self.space.model, range(draw, draw + 1))
            if self._fresh[0] != key:
                self._fresh = key, {}
            self._fresh[1][draw] = fresh
            if self._journal is not None:
                self._journal.add(key, draw, scores[draw])
        return scores[draw]

    @property
    def measured(self) -> list[Measured]:
        """Everything that was measured on all probes, best first."""
        known = [self(k) for k, scores in self._scores.items() if len(scores) == len(self.draws)]
        return sorted(known, key=lambda m: m.value)


def refine(
    judge: Judge,
    start: Picks,
    *,
    within: Callable[[Picks], bool],
    trials: int,
    spread: int = 12,
    ranking: int = 2,
    seconds: float | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure up to `trials` exchanges, always from the best assignment so far.

    It ends when two rankings on different probes name nothing that helps.

    Args:
        within: whether an assignment fits the budget and meets all other constraints.
        spread: exchanges in a row that do not help before single changes are measured again.
        ranking: probes on which single changes are measured.
        seconds: no exchange is begun after so much time; None: no limit.
    """
    best = judge(start)
    judge.start_from(start)
    began = time.monotonic()

    def late() -> bool:
        return seconds is not None and time.monotonic() - began > seconds

    tried, turn, failed = 0, 0, 0
    seen = {best.picks}
    while tried < trials and failed < 2 and not late():
        # the next ranking takes other probes of the fixed ones, so that no few of them decide
        some = [judge.draws[(turn + n) % len(judge.draws)] for n in range(ranking)]
        turn += ranking
        effects = effects_of(judge, best.picks, some)
        in_vain, failed = 0, failed + 1
        while in_vain < spread and tried < trials and not late():
            picks = _likeliest(effects, best.picks, within, seen)
            if picks is None:
                break
            seen.add(picks)
            tried += 1
            found = judge.beats(picks, best.picks)
            if found is None:
                in_vain += 1
                continue
            moved = {n for n, (a, b) in enumerate(zip(picks, best.picks, strict=True)) if a != b}
            effects = {m: e for m, e in effects.items() if m[0] not in moved}
            in_vain, failed = 0, 0
            note(
                f"exchange {tried} of {trials}: copy perplexity "
                f"{found.score.copy_perplexity:.3f}, perplexity {found.score.perplexity:.2f} "
                f"with {_difference(judge.space, best.picks, picks)}"
            )
            best = found
            judge.start_from(picks)
    return best


def effects_of(judge: Judge, picks: Picks, draws: Sequence[int]) -> dict[Move, float]:
    """What every single change adds to the value of an assignment on some probes."""
    base = judge.value(picks, draws)
    moves = [
        (site, pick)
        for site, row in enumerate(judge.space.candidates)
        for pick in range(len(row))
        if pick != picks[site]
    ]
    return {move: judge.value(changed(picks, move), draws) - base for move in moves}


def _likeliest(
    effects: Mapping[Move, float],
    picks: Picks,
    within: Callable[[Picks], bool],
    seen: set[Picks],
) -> Picks | None:
    """The new assignment, one move away or two, of least sum of single effects."""
    pairs = ((a, b) for a, b in itertools.combinations(effects, 2) if a[0] != b[0])
    options = [
        (sum(effects[m] for m in moves), after)
        for moves in itertools.chain(((move,) for move in effects), pairs)
        if (after := changed(picks, *moves)) not in seen and within(after)
    ]
    return min(options)[1] if options else None


def changed(picks: Picks, *moves: Move) -> Picks:
    """The assignment after some moves."""
    out = list(picks)
    for site, pick in moves:
        out[site] = pick
    return tuple(out)


def _difference(space: SearchSpace, old: Picks, new: Picks) -> str:
    """'layer 3: keep, layer 8: sink_window'."""
    return ", ".join(
        f"layer {site.index}: {row[b].mixer}"
        for site, row, a, b in zip(space.sites, space.candidates, old, new, strict=True)
        if a != b
    )
