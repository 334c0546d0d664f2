"""The multiple-choice knapsack: one candidate a site, least harm, cost within a budget, exactly.

Source: catalogue other.md E.2. Costs are rounded up to a grid, so a solution never exceeds the
budget; harms are additive by assumption, which callers have to check by measuring the solution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rewriter.errors import UsageError

GRID = 1000


@dataclass(frozen=True)
class Choice:
    """One candidate for every site.

    Attributes:
        picks: index of the candidate of each site.
        harm: sum of the harms.
        cost: sum of the true costs.
    """

    picks: tuple[int, ...]
    harm: float
    cost: float


def knapsack(
    harms: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    grid: int = GRID,
) -> Choice:
    """The assignment of least total harm whose total cost is at most `budget`.

    Args:
        harms: of each candidate at each site; infinite means not allowed.
        costs: likewise; negative where a candidate saves something around its site.
        budget: largest total cost.
        grid: cost units the budget is divided into; integral costs with an integral budget of at
            most `grid` are exact.

    Raises:
        UsageError: no assignment fits the budget.
    """
    least = [min([0.0, *row]) for row in costs]
    if any(least):
        shifted = [[c - low for c in row] for row, low in zip(costs, least, strict=True)]
        try:
            found = knapsack(harms, shifted, budget - sum(least), grid)
        except UsageError:
            raise UsageError(_too_small(costs, budget)) from None
        return replace(found, cost=found.cost + sum(least))
    if budget < 0:
        raise UsageError(_too_small(costs, budget))
    unit = _unit(costs, budget, grid)
    room = round(budget / unit) if unit > 0 else 0
    best = [0.0] + [math.inf] * room
    back: list[list[tuple[int, int]]] = []
    for harm_row, cost_row in zip(harms, costs, strict=True):
        after = [math.inf] * (room + 1)
        trail = [(-1, -1)] * (room + 1)
        for pick, (harm, cost) in enumerate(zip(harm_row, cost_row, strict=True)):
            width = math.ceil(cost / unit - 1e-9) if unit > 0 else 0
            if not math.isfinite(harm) or (unit == 0 and cost > 0):
                continue
            for used in range(room - width + 1):
                total = best[used] + harm
                if total < after[used + width]:
                    after[used + width] = total
                    trail[used + width] = (pick, used)
        best = after
        back.append(trail)
    end = min(range(room + 1), key=best.__getitem__)
    if not math.isfinite(best[end]):
        return _cheapest(harms, costs, budget)
    picks: list[int] = []
    at = end
    for trail in reversed(back):
        pick, at = trail[at]
        picks.append(pick)
    picks.reverse()
    spent = sum(row[p] for row, p in zip(costs, picks, strict=True))
    return Choice(tuple(picks), best[end], spent)


def _cheapest(
    harms: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> Choice:
    """The cheapest assignment, which may fit where its costs, rounded up, do not."""
    rows = [
        min(
            ((c[p], h[p], p) for p in range(len(h)) if math.isfinite(h[p])),
            default=(math.inf, math.inf, 0),
        )
        for h, c in zip(harms, costs, strict=True)
    ]
    spent = sum(cost for cost, _, _ in rows)
    if not spent <= budget:
        raise UsageError(_too_small(costs, budget))
    return Choice(tuple(pick for _, _, pick in rows), sum(harm for _, harm, _ in rows), spent)


def cheapest_choice(costs: Sequence[Sequence[float]]) -> float:
    """The least total cost any assignment has."""
    return sum(min(row) for row in costs)


def _unit(costs: Sequence[Sequence[float]], budget: float, grid: int) -> float:
    """A cost unit that divides everything evenly where costs are integers, else budget / grid."""
    values = [c for row in costs for c in row]
    if all(float(c).is_integer() for c in (*values, budget)) and budget <= grid:
        return 1.0
    return budget / grid


def _too_small(costs: Sequence[Sequence[float]], budget: float) -> str:
    return (
        f"no choice of mixers costs at most {budget:g}: the cheapest one costs about "
        f"{cheapest_choice(costs):g}; raise the budget or allow cheaper mixers"
    )
