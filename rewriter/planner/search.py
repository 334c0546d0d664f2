"""The training-free search: a start, exchanges judged by measurement, and an ordinary plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.errors import UsageError
from rewriter.mixers import registry
from rewriter.plan import Decision, Plan, tool_version
from rewriter.planner.journal import Journal, digest
from rewriter.planner.knapsack import knapsack
from rewriter.planner.objective import Objective, Score
from rewriter.planner.refine import Judge, Measured, effects_of, refine
from rewriter.planner.relax import relaxed_harms
from rewriter.planner.space import SearchSpace


@dataclass(frozen=True)
class SearchOptions:
    """How long to search.

    Attributes:
        steps: gradient steps of a relaxed search that gives a second start; 0: none.
        trials: exchanges tried after it; one that is clearly worse is given up after two probes.
        draws: probes an exchange is measured on; they are not used by the relaxed steps.
        seconds: no exchange is begun after so much time in them; None: no limit.
        finalists: best assignments that are measured again in the precise space, if there is one.
        journal: file in which scores are noted; a search that was stopped goes on from it.
    """

    steps: int = 0
    trials: int = 120
    draws: int = 8
    seconds: float | None = None
    finalists: int = 4
    journal: Path | None = None

    @property
    def probes(self) -> range:
        """Draws that measure assignments; the relaxed steps use others."""
        return range(10_000, 10_000 + self.draws)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the best assignment as a plan for `rewriter.rewrite`.
        best: the best assignment and its score on the search's own probes, which flatter it: judge
            it on other text.
        start: the assignment before the exchanges.
        measured: every assignment within the budget that was measured on all probes, best first.
        cost: of the best assignment.
        budget: largest cost that was allowed.
        costs: of every measured assignment.
        judge: measures further assignments on the same probes.
        seconds: processor time of the measurements, with those of a journal's earlier runs; None
            without a journal.
    """

    plan: Plan
    best: Measured
    start: Measured
    measured: tuple[Measured, ...]
    cost: float
    budget: float
    costs: tuple[float, ...]
    judge: Judge = field(repr=False, compare=False)
    seconds: float | None = None

    def to_json(self, unit: str = "") -> dict[str, Any]:
        """Plain values, as a result page reads them; `unit` names the unit of the costs."""
        return {
            "budget": self.budget,
            "unit": unit,
            "best": {"cost": self.cost, **_plain(self.best.score), "picks": self.best.picks},
            "assignments": [
                {"cost": cost, **_plain(m.score), "picks": m.picks}
                for m, cost in zip(self.measured, self.costs, strict=True)
            ],
        }


def search(
    space: SearchSpace,
    objective: Objective,
    budget: float,
    options: SearchOptions | None = None,
    note: Callable[[str], None] = lambda text: None,
    kinds: int | None = None,
    precise: SearchSpace | None = None,
) -> SearchResult:
    """Find the assignment of least measured loss whose cost is within the budget.

    Args:
        budget: largest sum of the candidates' costs, in their unit.
        note: called with one line of progress now and then.
        kinds: most different mixers in the result, options aside.
        precise: the same sites and candidates in the dtype that counts, where `space` runs in a
            faster one: the best few assignments are measured again in it, and it decides.

    Raises:
        UsageError: nothing fits the budget.
    """
    chosen = options or SearchOptions()

    def within(picks: Sequence[int]) -> bool:
        fits = space.cost(picks) <= budget + 1e-9 * max(1.0, abs(budget))
        return fits and (kinds is None or len(mixers_of(space, picks)) <= kinds)

    journal = None
    if chosen.journal is not None:
        journal = Journal(chosen.journal, digest(space, objective))
    judge = Judge(space, objective, chosen.probes, journal)
    every = [single_harms(judge, chosen.probes[:2])]
    if chosen.steps:
        every.append(relaxed_harms(space, objective, budget, steps=chosen.steps, note=note))
    starts = [judge(_rounded(space, harms, budget, kinds)) for harms in every]
    start = min(starts, key=lambda m: m.value)
    note(
        f"start: copy perplexity {start.score.copy_perplexity:.3f}, perplexity "
        f"{start.score.perplexity:.2f}"
    )
    best = refine(
        judge,
        start.picks,
        trials=chosen.trials,
        seconds=chosen.seconds,
        within=within,
        note=note,
    )
    measured = tuple(m for m in judge.measured if within(m.picks))
    if precise is not None:
        judge = Judge(precise, objective, chosen.probes)
        finals = [judge(m.picks) for m in measured[: max(1, chosen.finalists)]]
        best, start = min(finals, key=lambda m: m.value), judge(start.picks)
        note(
            f"measured again: copy perplexity {best.score.copy_perplexity:.3f}, "
            f"perplexity {best.score.perplexity:.2f}"
        )
        precise.use(best.picks)
    space.use(best.picks)
    return SearchResult(
        plan=plan_of(space, best.picks),
        best=best,
        start=start,
        measured=measured,
        cost=space.cost(best.picks),
        budget=budget,
        costs=tuple(space.cost(m.picks) for m in measured),
        judge=judge,
        seconds=None if journal is None else journal.seconds,
    )


def single_harms(judge: Judge, draws: Sequence[int]) -> list[list[float]]:
    """What each candidate at one site adds to the value of the exact assignment."""
    exact = judge.space.exact
    judge.value(exact, draws)
    judge.start_from(exact)
    effects = effects_of(judge, exact, draws)
    return [
        [effects.get((site, pick), 0.0) for pick in range(len(row))]
        for site, row in enumerate(judge.space.candidates)
    ]


def mixers_of(space: SearchSpace, picks: Sequence[int]) -> frozenset[str]:
    """Names of the mixers that an assignment uses."""
    return frozenset(row[p].mixer for row, p in zip(space.candidates, picks, strict=True))


def _rounded(
    space: SearchSpace, harms: list[list[float]], budget: float, kinds: int | None
) -> tuple[int, ...]:
    """The knapsack's assignment with at most `kinds` mixers."""
    every = sorted({c.mixer for row in space.candidates for c in row})
    if kinds is None or kinds >= len(every):
        return knapsack(harms, space.costs, budget).picks
    best = None
    for chosen in itertools.combinations(every, kinds):
        masked = [
            [h if c.mixer in chosen else math.inf for h, c in zip(hs, cs, strict=True)]
            for hs, cs in zip(harms, space.candidates, strict=True)
        ]
        try:
            found = knapsack(masked, space.costs, budget)
        except UsageError:
            continue
        if best is None or found.harm < best.harm:
            best = found
    if best is None:
        raise UsageError(
            f"no choice of {kinds} mixers fits the budget at every site; allow more kinds"
        )
    return best.picks


def _plain(score: Score) -> dict[str, float]:
    return {"perplexity": score.perplexity, "copy_perplexity": score.copy_perplexity}


def plan_of(space: SearchSpace, picks: tuple[int, ...]) -> Plan:
    """An assignment as a plan."""
    decisions = []
    for site, row, pick in zip(space.sites, space.candidates, picks, strict=True):
        candidate = row[pick]
        mixer = registry.get(candidate.mixer)
        decisions.append(
            Decision(
                fqn=site.fqn,
                index=site.index,
                target=candidate.mixer,
                options=mixer.Options(**candidate.options).model_dump(mode="json"),
                tier=mixer.info.tier,
                rule="search",
                site=site.to_json(),
            )
        )
    return Plan(policy="search", tool=tool_version(), decisions=decisions)
