"""How far sensitivities of single sites add up: their sum against what was measured.

From the assignment in which every site runs its best-known candidate (the exact one), one site at a
time is switched and measured. The sum of these single harms is what a knapsack believes; it is
fitted to measured assignments by one factor, and the error that stays is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rewriter.planner.objective import Objective
from rewriter.planner.refine import Judge, Measured
from rewriter.planner.relax import slopes
from rewriter.planner.space import SearchSpace


@dataclass(frozen=True)
class Additivity:
    """The sum of single harms against measured harms, in nats of the objective.

    Attributes:
        factor: that makes the sums fit best (least squares through the origin).
        correlation: of sums and measurements.
        error: mean absolute difference after the factor.
        spread: mean absolute difference of the measurements from their own mean, to compare with.
        assignments: how many were compared.
    """

    factor: float
    correlation: float
    error: float
    spread: float
    assignments: int

    def to_json(self) -> dict[str, Any]:
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    def describe(self) -> str:
        return (
            f"sums of single harms, times {self.factor:.2g}, miss {self.assignments} measured "
            f"assignments by {self.error:.2f} nats on average (these differ from their mean by "
            f"{self.spread:.2f}); correlation {self.correlation:.2f}"
        )


def additivity(
    space: SearchSpace,
    objective: Objective,
    judge: Judge,
    draws: range,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Additivity, list[list[float]]]:
    """Calibrate on everything the judge has measured; also the first-order single harms.

    The harms are slopes at the exact assignment: one backward pass gives all of them.
    """
    exact = space.exact
    base = judge(exact)
    slope = slopes(space, objective, exact, draws)
    harms = [[s - row[e] for s in row] for row, e in zip(slope, exact, strict=True)]
    compared = [m for m in judge.measured if m.picks != exact]
    return fitted(harms, compared, base.value), harms


def fitted(
    harms: Sequence[Sequence[float]], measured: Sequence[Measured], base: float
) -> Additivity:
    """Compare sums of harms with the measured values above `base`."""
    sums = [sum(r[p] for r, p in zip(harms, m.picks, strict=True)) for m in measured]
    true = [m.value - base for m in measured]
    n = len(sums)
    square = sum(s * s for s in sums)
    factor = sum(s * t for s, t in zip(sums, true, strict=True)) / square if square else math.nan
    if n < 2:
        return Additivity(factor, math.nan, math.nan, math.nan, n)
    error = sum(abs(factor * s - t) for s, t in zip(sums, true, strict=True)) / n
    a, b = sum(sums) / n, sum(true) / n
    above = sum((s - a) * (t - b) for s, t in zip(sums, true, strict=True))
    below = math.sqrt(sum((s - a) ** 2 for s in sums) * sum((t - b) ** 2 for t in true))
    spread = sum(abs(t - b) for t in true) / n
    return Additivity(factor, above / below if below else math.nan, error, spread, n)
