"""The training-free search: relax, round, refine on measurements, and return an ordinary plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewriter.errors import UsageError
from rewriter.mixers import registry
from rewriter.plan import Decision, Plan, tool_version
from rewriter.planner.knapsack import knapsack
from rewriter.planner.objective import Objective, Score
from rewriter.planner.refine import Judge, Measured, refine
from rewriter.planner.relax import relaxed_harms
from rewriter.planner.space import SearchSpace


@dataclass(frozen=True)
class SearchOptions:
    """How long to search.

    Attributes:
        steps: gradient steps of the relaxed search.
        trials: exchanges tried after it; one that is clearly worse is given up after two probes.
        draws: probes an exchange is measured on; they are not used by the relaxed steps.
        seed: of the random exchanges.
        finalists: best assignments that are measured again in the precise space, if there is one.
    """

    steps: int = 40
    trials: int = 120
    draws: int = 8
    seed: int = 0
    finalists: int = 4

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
        relaxed: the assignment after the relaxed steps, before refinement.
        measured: every assignment that was measured, best first.
        cost: of the best assignment.
        budget: largest cost that was allowed.
        costs: of every measured assignment.
        judge: measures further assignments on the same probes.
    """

    plan: Plan
    best: Measured
    relaxed: Measured
    measured: tuple[Measured, ...]
    cost: float
    budget: float
    costs: tuple[float, ...]
    judge: Judge = field(repr=False, compare=False)

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
    harms = relaxed_harms(space, objective, budget, steps=chosen.steps, note=note)
    start, names = _rounded(space, harms, budget, kinds)
    judge = Judge(space, objective, chosen.probes)
    relaxed = judge(start)
    note(
        f"rounded: copy perplexity {relaxed.score.copy_perplexity:.3f}, "
        f"perplexity {relaxed.score.perplexity:.2f}"
    )
    best = refine(
        judge,
        start,
        budget,
        trials=chosen.trials,
        seed=chosen.seed,
        allowed=lambda picks: names is None or mixers_of(space, picks) <= names,
        note=note,
    )
    measured = tuple(judge.measured)
    if precise is not None:
        judge = Judge(precise, objective, chosen.probes)
        finals = [judge(m.picks) for m in measured[: max(1, chosen.finalists)]]
        best, relaxed = min(finals, key=lambda m: m.value), judge(relaxed.picks)
        note(
            f"measured again: copy perplexity {best.score.copy_perplexity:.3f}, "
            f"perplexity {best.score.perplexity:.2f}"
        )
        precise.use(best.picks)
    space.use(best.picks)
    return SearchResult(
        plan=plan_of(space, best.picks),
        best=best,
        relaxed=relaxed,
        measured=measured,
        cost=space.cost(best.picks),
        budget=budget,
        costs=tuple(space.cost(m.picks) for m in measured),
        judge=judge,
    )


def mixers_of(space: SearchSpace, picks: Sequence[int]) -> frozenset[str]:
    """Names of the mixers that an assignment uses."""
    return frozenset(row[p].mixer for row, p in zip(space.candidates, picks, strict=True))


def _rounded(
    space: SearchSpace, harms: list[list[float]], budget: float, kinds: int | None
) -> tuple[tuple[int, ...], frozenset[str] | None]:
    """The knapsack's assignment with at most `kinds` mixers, and which ones; None: any."""
    every = sorted({c.mixer for row in space.candidates for c in row})
    if kinds is None or kinds >= len(every):
        return knapsack(harms, space.costs, budget).picks, None
    best, names = None, None
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
            best, names = found, frozenset(chosen)
    if best is None:
        raise UsageError(
            f"no choice of {kinds} mixers fits the budget at every site; allow more kinds"
        )
    return best.picks, names


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
