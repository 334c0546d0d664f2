"""From which length one mixer is cheaper than another, solved in symbols or on measured times."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from rewriter.ir.state import TOKENS


def solved(first: sympy.Expr, second: sympy.Expr) -> list[float]:
    """Lengths N > 0 at which two costs over N are equal, ascending.

    Costs with a minimum over N (windows) are solved on either side of it.
    """
    real = sympy.Symbol("x", positive=True)
    difference = sympy.piecewise_fold(
        sympy.sympify(first - second).subs(TOKENS, real).rewrite(sympy.Piecewise)
    )
    roots = sympy.solveset(difference, real, sympy.Interval.open(0, sympy.oo))
    if not isinstance(roots, sympy.FiniteSet):
        return []
    return sorted(float(r) for r in roots if r.is_real)


def between(
    first: Callable[[int], float], second: Callable[[int], float], low: int, high: int
) -> float | None:
    """Length in [low, high] from which `second` takes less time and keeps doing so up to `high`.

    Bisection on the last change of sign among lengths that double; `low` if it is faster
    everywhere, None if it is not faster at `high`.
    """
    lengths = [low]
    while lengths[-1] < high:
        lengths.append(min(2 * lengths[-1], high))
    slower = [n for n in lengths if second(n) >= first(n)]
    if not slower:
        return float(low)
    if slower[-1] == lengths[-1]:
        return None
    start, end = slower[-1], lengths[lengths.index(slower[-1]) + 1]
    while end - start > max(1, start // 256):
        middle = (start + end) // 2
        start, end = (middle, end) if second(middle) >= first(middle) else (start, middle)
    return float(end)
