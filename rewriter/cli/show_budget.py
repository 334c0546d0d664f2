"""What a search under a budget found."""

from __future__ import annotations

from rich.console import RenderableType

from rewriter.budgets import Budget
from rewriter.cli.tables import Column, bullets, heading, number, size, table
from rewriter.planner.budgeting import BudgetResult


def budget_view(found: BudgetResult, budget: Budget) -> list[RenderableType]:
    """Budget and prediction, quality on the search's probes, the front, and what to trust."""

    def amount(value: float) -> str:
        return size(value) if budget.memory is not None else f"{number(value * 1e3)} ms"

    costs, score = found.costs, found.search.best.score
    lines = [
        ("-", f"{budget.describe()}, that is {amount(costs.limit)}"),
        ("-", f"predicted: {amount(found.predicted)}; exact everywhere {amount(costs.exact)}"),
        (
            "-",
            f"on the probes of the search: perplexity {score.perplexity:.4g}, copy perplexity "
            f"{score.copy_perplexity:.4g} (they flatter the choice; judge it with 'rewriter eval')",
        ),
        ("-", found.additivity.describe()),
    ]
    columns: list[Column] = [
        ("cost", "right"),
        ("perplexity", "right"),
        ("copy perplexity", "right"),
        "mixers",
    ]
    rows = []
    for cost, m in found.front:
        used: dict[str, int] = {}
        for row, pick in zip(found.space.candidates, m.picks, strict=True):
            used[row[pick].mixer] = used.get(row[pick].mixer, 0) + 1
        mixers = ", ".join(f"{n} {name}" for name, n in used.items())
        perplexities = (number(m.score.perplexity), number(m.score.copy_perplexity))
        rows.append((amount(cost), *perplexities, mixers))
    front = table(columns, rows, fold=("mixers",))
    return [heading("budget"), bullets(lines), heading("measured, best at each cost"), front]
