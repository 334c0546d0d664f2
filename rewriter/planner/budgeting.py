"""From a budget to a plan: costs from the device, quality from the search, one figure for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.budgets import Budget
from rewriter.errors import UsageError
from rewriter.ir.site import AttentionSite
from rewriter.mixers import registry
from rewriter.passes.examples import Examples, examples_for
from rewriter.plan import Decision, Plan
from rewriter.planner.additivity import Additivity, additivity
from rewriter.planner.device import Device
from rewriter.planner.knapsack import knapsack
from rewriter.planner.objective import Objective, Probes
from rewriter.planner.predict import Use, cache_bytes, core_seconds, predict, spared_seconds
from rewriter.planner.refine import Measured, Picks
from rewriter.planner.search import SearchOptions, SearchResult, plan_of, search
from rewriter.planner.space import Candidate, SearchSpace, open_space
from rewriter.planner.trunk import Trunk, trunk_of

Note = Callable[[str], None]


@dataclass(frozen=True)
class Costs:
    """What a budget comes to on a device, in seconds or bytes.

    Attributes:
        limit: largest cost of the whole forward, or of the whole cache.
        around: what the model takes outside of the sites' cores.
        exact: what the model takes with the exact mixer everywhere.
    """

    limit: float
    around: float
    exact: float


@dataclass(frozen=True)
class BudgetResult:
    """A plan under a budget.

    Attributes:
        plan: an ordinary plan, one decision for every site.
        costs: limit, and what does not depend on the choice.
        predicted: cost of the plan, `costs.around` included.
        search: every assignment that was measured, best first.
        space: the model in which they were measured; `space.use` switches between them.
        front: measured assignments that no other one beats in cost and quality, cheapest first.
        additivity: how well sums of single sensitivities predict what was measured.
    """

    plan: Plan
    costs: Costs
    predicted: float
    search: SearchResult
    space: SearchSpace
    front: tuple[tuple[float, Measured], ...]
    additivity: Additivity

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a result page reads them."""
        return {
            **self.search.to_json(),
            "limit": self.costs.limit,
            "exact": self.costs.exact,
            "around": self.costs.around,
            "predicted": self.predicted,
            "additivity": self.additivity.to_json(),
            "front": [
                {"cost": cost, "perplexity": m.score.perplexity,
                 "copy_perplexity": m.score.copy_perplexity, "picks": m.picks}
                for cost, m in self.front
            ],
        }  # fmt: skip


def plan_under(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    budget: Budget,
    stream: torch.Tensor,
    *,
    device: Device | None = None,
    trunk: Trunk | None = None,
    examples: Examples | None = None,
    probes: Probes | None = None,
    journal: Path | None = None,
    exact_seconds: float | None = None,
    note: Note = lambda text: None,
) -> BudgetResult:
    """Search the assignment of least measured loss that the budget allows.

    Args:
        stream: (tokens,) int64 text for the probes; keep the text of the final judgement out.
        device: in place of the one that a budget of latency names.
        trunk: of the model, where it was read already.
        exact_seconds: measured time of the forward with the exact mixer everywhere, where more than
            attention runs on generated code; the prediction knows the original's other parts.
        journal: file in which scores are noted; a search that was stopped goes on from it.

    Raises:
        UsageError: the budget cannot be met; the message says by what the cheapest plan exceeds it.
        NoSiteError: no site has a choice.
    """
    examples = examples if examples is not None else examples_for(model)
    if device is None and budget.latency is not None:
        device = Device.load(budget.device)
    if trunk is None and budget.latency is not None:
        trunk = trunk_of(model, examples)
    candidates = _candidates(budget, sites)
    costs = _costs(budget, device, trunk, sites, exact_seconds)
    fixed = {i % len(sites) for i in _checked(budget.never, len(sites))}
    # where the exact mixer cannot serve, the original attention stays
    fixed |= {s.index for s in sites if _exact_use(budget, s).mixer != budget.exact}
    free = [s for s in sites if s.index not in fixed]
    held = [_exact_use(budget, s) for s in sites if s.index in fixed]

    def cost(site: AttentionSite, candidate: Candidate) -> float:
        return cost_of(budget, device, Use(site, candidate.mixer, candidate.options))

    space = open_space(model, free, candidates, examples, cost=cost)
    searched = {s.index for s in space.sites}
    held += [_exact_use(budget, s) for s in free if s.index not in searched]
    spent = costs.around + sum(cost_of(budget, device, use) for use in held)
    room = costs.limit - spent
    least = sum(min(row) for row in space.costs)
    if room < least:
        raise UsageError(
            f"{budget.describe()}: that is {costs.limit:.4g}, but the cheapest plan takes "
            f"{spent + least:.4g}, of which {spent:.4g} does not depend on the choice; raise the "
            "budget, or offer cheaper mixers in 'choices'"
        )
    objective = Objective(stream, probes or Probes())
    options = SearchOptions(budget.steps, budget.trials, budget.draws, journal=journal)
    found = search(space, objective, room, options, note, kinds=budget.kinds)
    judge = found.judge
    calibrated, harms = additivity(space, objective, judge, options.probes, note)
    for share in (0.75, 0.5, 0.25):
        spend = least + share * (space.cost(found.best.picks) - least)
        judge(knapsack(harms, space.costs, spend).picks)
    front = pareto([(spent + space.cost(m.picks), m) for m in judge.measured])
    space.use(found.best.picks)
    return BudgetResult(
        plan=_whole(plan_of(space, found.best.picks), held, budget),
        costs=costs,
        predicted=spent + found.cost,
        search=replace(
            found,
            measured=tuple(judge.measured),
            costs=tuple(space.cost(m.picks) for m in judge.measured),
        ),
        space=space,
        front=tuple(front),
        additivity=calibrated,
    )


def cost_of(budget: Budget, device: Device | None, use: Use) -> float:
    """Seconds or bytes of one site, as the budget counts; projections that it spares count back."""
    if budget.memory is not None:
        return float(cache_bytes(use, budget.context, budget.batch, budget.dtype))
    assert device is not None
    given = (device, use, budget.phase, budget.context, budget.batch, budget.dtype)
    return core_seconds(*given) - spared_seconds(*given)


def pareto(points: Sequence[tuple[float, Measured]]) -> list[tuple[float, Measured]]:
    """Those that no other one beats in cost and value, cheapest first."""
    front: list[tuple[float, Measured]] = []
    for cost, measured in sorted(points, key=lambda p: (p[0], p[1].value)):
        if not front or measured.value < front[-1][1].value:
            front.append((cost, measured))
    return front


def uniform(picks: Sequence[int]) -> Picks:
    """The same candidates as often as in `picks`, each evenly spread over the sites.

    Where all sites have the same candidates at the same cost, both cost the same.
    """
    counts = Counter(picks)
    spread = sorted(
        ((n + 0.5) / count, pick) for pick, count in counts.items() for n in range(count)
    )
    return tuple(pick for _, pick in spread)


def _costs(
    budget: Budget,
    device: Device | None,
    trunk: Trunk | None,
    sites: Sequence[AttentionSite],
    measured: float | None,
) -> Costs:
    uses = [_exact_use(budget, site) for site in sites]
    if budget.memory is not None:
        exact = sum(cost_of(budget, device, use) for use in uses)
        return Costs(budget.limit.of(exact), 0.0, exact)
    assert device is not None and trunk is not None
    whole = predict(
        device,
        trunk,
        uses,
        budget.phase,
        budget.context,
        batch=budget.batch,
        dtype=budget.dtype,
        compiled_step=budget.exact == "fused" and device.measured,
    )
    seconds = whole.seconds if measured is None else measured
    return Costs(budget.limit.of(seconds), seconds - whole.cores, seconds)


def _candidates(budget: Budget, sites: Sequence[AttentionSite]) -> list[Candidate]:
    out = [Candidate(budget.exact), *(Candidate(c.use, c.options) for c in budget.choices)]
    if budget.bounded and sites:
        site = next((s for s in sites if s.kind == "causal"), sites[0])
        out = [c for c in out if _bounded(c, site)]
        if not out:
            raise UsageError("no mixer of 'choices' has a bounded cache")
    return out


def _bounded(candidate: Candidate, site: AttentionSite) -> bool:
    mixer = registry.get(candidate.mixer)
    return mixer.state_spec(site, mixer.Options(**candidate.options)).bounded


def _exact_use(budget: Budget, site: AttentionSite) -> Use:
    mixer = registry.get(budget.exact)
    refused = mixer.refuse(site, mixer.Options())
    return Use(site, "keep" if refused is not None else budget.exact, {})


def _checked(never: Sequence[int], count: int) -> Sequence[int]:
    for number in never:
        if not -count <= number < count:
            raise UsageError(
                f"'never' names site {number}, but the model has {count} attention sites"
            )
    return never


def _whole(plan: Plan, held: Sequence[Use], budget: Budget) -> Plan:
    """The searched decisions and those of the sites that were not searched, in order."""
    more = []
    for use in held:
        mixer = registry.get(use.mixer)
        more.append(
            Decision(
                fqn=use.site.fqn,
                index=use.site.index,
                target=use.mixer,
                options=mixer.Options(**use.options).model_dump(mode="json"),
                tier=mixer.info.tier,
                rule="not searched",
                site=use.site.to_json(),
            )
        )
    decisions = sorted([*plan.decisions, *more], key=lambda d: d.index)
    return plan.model_copy(update={"decisions": decisions, "policy": budget.describe()})
