"""The relaxed search: every site runs a weighted sum of its candidates, and the weights learn.

One backward pass gives the effect of every candidate at every site in the presence of all other
choices, which one-at-a-time sensitivities cannot: they are not additive. The weights are a softmax
whose temperature falls, with a price on cost that is solved at every step so that the expected
cost meets the budget (the continuous form of a layer search by gates; catalogue other.md E.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rewriter.planner.objective import Objective
from rewriter.planner.space import SearchSpace

Note = Callable[[str], None]


def relaxed_harms(
    space: SearchSpace,
    objective: Objective,
    budget: float,
    *,
    steps: int = 40,
    rate: float = 0.3,
    temperatures: tuple[float, float] = (1.0, 0.1),
    note: Note = lambda text: None,
) -> list[list[float]]:
    """Learn the weights for `steps` probes; their logits, negated, rank the candidates of a site.

    The sum of an assignment's harms is what a knapsack minimises; it has no unit.
    """
    logits = [torch.zeros(len(row), requires_grad=True) for row in space.candidates]
    optimiser = torch.optim.Adam(logits, lr=rate, betas=(0.8, 0.95))
    costs = [torch.tensor(row) for row in space.costs]
    high, low = temperatures
    for step in range(steps):
        temperature = high * (low / high) ** (step / max(steps - 1, 1))
        weights = _weights(logits, costs, budget, temperature)
        space.use_weights(weights)
        loss = objective.total(space.model, step)
        optimiser.zero_grad()
        torch.autograd.backward(loss, inputs=logits)
        optimiser.step()
        note(f"relaxed step {step + 1} of {steps}: loss {float(loss.detach()):.3f}")
    with torch.no_grad():
        return [(-row).tolist() for row in logits]


def slopes(
    space: SearchSpace, objective: Objective, picks: Sequence[int], draws: range
) -> list[list[float]]:
    """d loss / d weight of every candidate at every site, at an assignment, mean over draws."""
    weights = [
        torch.nn.functional.one_hot(torch.tensor(pick), len(row)).float().requires_grad_()
        for pick, row in zip(picks, space.candidates, strict=True)
    ]
    space.use_weights(weights)
    for draw in draws:
        torch.autograd.backward(objective.total(space.model, draw), inputs=weights)
    space.use(picks)
    return [(w.grad / len(draws)).tolist() for w in weights if w.grad is not None]


def _weights(
    logits: Sequence[torch.Tensor],
    costs: Sequence[torch.Tensor],
    budget: float,
    temperature: float,
) -> list[torch.Tensor]:
    """Softmax weights whose expected cost meets the budget; the price is found by bisection."""

    def at(price: float) -> list[torch.Tensor]:
        return [
            ((row - price * cost) / temperature).softmax(-1)
            for row, cost in zip(logits, costs, strict=True)
        ]

    def spent(price: float) -> float:
        with torch.no_grad():
            return sum(float((w * c).sum()) for w, c in zip(at(price), costs, strict=True))

    if spent(0.0) <= budget:
        return at(0.0)
    low, high = 0.0, 1.0
    while spent(high) > budget and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return at(high)
