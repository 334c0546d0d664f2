"""The training-free search: relax, round, refine on measurements, and return an ordinary plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewriter.mixers import registry
from rewriter.plan import Decision, Plan, tool_version
from rewriter.planner.objective import Objective, Score
from rewriter.planner.refine import Judge, Measured, refine
from rewriter.planner.relax import relaxed_picks
from rewriter.planner.space import SearchSpace


@dataclass(frozen=True)
class SearchOptions:
    """How long to search.

    Attributes:
        steps: gradient steps of the relaxed search.
        trials: measured exchanges after it.
        draws: probes every exchange is measured on; they are not used by the relaxed steps.
        seed: of the random exchanges.
    """

    steps: int = 40
    trials: int = 40
    draws: int = 4
    seed: int = 0


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
    """

    plan: Plan
    best: Measured
    relaxed: Measured
    measured: tuple[Measured, ...]
    cost: float
    budget: float
    costs: tuple[float, ...]

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
) -> SearchResult:
    """Find the assignment of least measured loss whose cost is within the budget.

    Args:
        budget: largest sum of the candidates' costs, in their unit.
        note: called with one line of progress now and then.

    Raises:
        UsageError: nothing fits the budget.
    """
    chosen = options or SearchOptions()
    start = relaxed_picks(space, objective, budget, steps=chosen.steps, note=note)
    judge = Judge(space, objective, range(10_000, 10_000 + chosen.draws))
    relaxed = judge(start)
    note(
        f"rounded: copy perplexity {relaxed.score.copy_perplexity:.3f}, "
        f"perplexity {relaxed.score.perplexity:.2f}"
    )
    best = refine(judge, start, budget, trials=chosen.trials, seed=chosen.seed, note=note)
    space.use(best.picks)
    measured = tuple(judge.measured)
    return SearchResult(
        plan=plan_of(space, best.picks),
        best=best,
        relaxed=relaxed,
        measured=measured,
        cost=space.cost(best.picks),
        budget=budget,
        costs=tuple(space.cost(m.picks) for m in measured),
    )


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
