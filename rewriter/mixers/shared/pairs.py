"""How many pairs of query and key a mask shows, symbolic in the number of tokens."""

from __future__ import annotations

import sympy

from rewriter.ir.state import TOKENS


def causal_pairs(most: int | None = None) -> sympy.Expr:
    """Pairs among N tokens where a query sees its own and earlier keys, at most `most` of them.

    Exact: the sum of min(i + 1, most) over the queries i, so a difference of two lengths is what
    one more token costs. A window of w with s sinks shows w + s keys.
    """
    if most is None:
        return TOKENS * (TOKENS + 1) / 2
    seen = sympy.Min(TOKENS, most)
    return seen * (seen + 1) / 2 + (TOKENS - seen) * seen
