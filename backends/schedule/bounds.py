"""What a condition can be on a rectangle of (i, j), without looking inside.

Interval arithmetic over many rectangles at once. Each comparison is one interval test; and, or and
not combine three-valued results. The result may be too cautious ('perhaps'), never wrong, and it
says where 'perhaps' is known to be both. Catalogue: sparse.md section 1.1 (interval, full-block and
modulus rules).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewriter.ir.lookup import Table
from rewriter.ir.predicate import Term

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Range(NamedTuple):
    """lo <= x <= hi. `tight`: both ends occur; `solid`: everything between them too."""

    lo: Ints
    hi: Ints
    tight: Bools
    solid: Bools


class Truth(NamedTuple):
    """`may` be true, may be false (`fail`); `hit`, `miss`: certainly so somewhere."""

    may: Bools
    fail: Bools
    hit: Bools
    miss: Bools


TRUE, FALSE = np.bool_(True), np.bool_(False)
Rectangles = Mapping[str, Range]


def span(lo: Ints, hi: Ints) -> Range:
    """The range of a variable that takes every value from lo to hi."""
    return Range(lo, hi, np.asarray(TRUE), np.asarray(TRUE))


def truth(term: Term, at: Rectangles) -> Truth:
    """A condition on rectangles given as ranges of i, j and h (h a single value in each)."""
    if term.op in ("true", "false"):
        yes = np.asarray(term.op == "true")
        return Truth(yes, ~yes, yes, ~yes)
    if term.op == "not":
        inner = truth(term.args[0], at)
        return Truth(inner.fail, inner.may, inner.miss, inner.hit)
    if term.op == "and":
        return _all([truth(a, at) for a in term.args], term.apart)
    if term.op == "or":
        parts = [truth(a, at) for a in term.args]
        flipped = _all([Truth(p.fail, p.may, p.miss, p.hit) for p in parts], term.apart)
        return Truth(flipped.fail, flipped.may, flipped.miss, flipped.hit)
    if term.op == "table":
        return _table(term, at)
    if term.op in ("le", "lt"):
        return _less(term, at)
    same = _equal(term, at)
    return same if term.op == "eq" else Truth(same.fail, same.may, same.miss, same.hit)


def _all(parts: Sequence[Truth], apart: bool) -> Truth:
    may = reduce(np.logical_and, [p.may for p in parts])
    fail = reduce(np.logical_or, [p.fail for p in parts])
    hit = reduce(np.logical_and, [p.hit for p in parts])
    if not apart:
        # Parts that always hold do not disturb the single one that varies.
        hit = hit & (sum(p.fail.astype(np.int8) for p in parts) <= 1)
    return Truth(may, fail, hit, reduce(np.logical_or, [p.miss for p in parts]))


def _less(term: Term, at: Rectangles) -> Truth:
    a, b, strict = bounds(term.args[0], at), bounds(term.args[1], at), term.op == "lt"
    may, fail = a.lo + strict <= b.hi, a.hi + strict > b.lo
    sure = a.tight & b.tight & term.apart
    return Truth(may, fail, may & (sure | ~fail), fail & (sure | ~may))


def _equal(term: Term, at: Rectangles) -> Truth:
    left, right = term.args
    if right.op == "mod" and left.op == "const":
        left, right = right, left
    if left.op == "mod" and right.op == "const":
        return _congruent(left, right, at)
    a, b = bounds(left, at), bounds(right, at)
    may = (a.lo <= b.hi) & (b.lo <= a.hi)
    fail = (a.lo != b.lo) | (a.hi != b.hi) | (a.lo != a.hi)
    hit = may & ((a.solid & b.solid & term.apart) | ~fail)
    return Truth(may, fail, hit, fail & ((a.tight & b.tight & term.apart) | ~may))


def _congruent(modulus: Term, rest: Term, at: Rectangles) -> Truth:
    """x mod p == r: some x of the range is r modulo p, and unless it is alone some is not."""
    x, p, r = bounds(modulus.args[0], at), _constant(modulus.args[1]), _constant(rest)
    if not 0 <= r < p:
        return Truth(*(np.asarray(b) for b in (False, True, False, True)))
    may = (x.hi - r) // p >= -((r - x.lo) // p)
    fail = ~may | ((x.lo != x.hi) & (p > 1))
    return Truth(may, fail, may & (x.solid | ~fail), fail & (x.solid | ~may))


def _constant(term: Term) -> int:
    assert isinstance(term.value, int)
    return term.value


def _table(term: Term, at: Rectangles) -> Truth:
    """Counts of true entries in the rectangle of indices, from running sums."""
    table = term.value
    assert isinstance(table, Table)
    index = [bounds(a, at) for a in term.args]
    ends, area, inside = [], np.ones((), np.int64), np.ones((), np.int64)
    for x, size in zip(index, table.shape, strict=True):
        lo, hi = np.clip(x.lo, 0, size), np.clip(x.hi + 1, 0, size)
        ends.append((lo, hi))
        area, inside = area * (x.hi - x.lo + 1), inside * (hi - lo)
    count = np.zeros((), np.int64)
    for corner in product((0, 1), repeat=len(ends)):
        sign = (-1) ** (len(ends) - sum(corner))
        count = count + sign * table.counts[tuple(e[c] for e, c in zip(ends, corner, strict=True))]
    count = np.where(inside > 0, count, 0)
    may, fail = count > 0, count < area
    sure = reduce(np.logical_and, [x.solid for x in index]) & term.apart
    return Truth(may, fail, may & (sure | ~fail), fail & (sure | ~may))


def bounds(term: Term, at: Rectangles) -> Range:
    """The range of an integer term on every rectangle."""
    if term.op == "var":
        return at[str(term.value)]
    if term.op == "const":
        x = np.asarray(_constant(term), dtype=np.int64)
        return span(x, x)
    if term.op == "floordiv":
        a, d = bounds(term.args[0], at), _constant(term.args[1])
        return Range(a.lo // d, a.hi // d, a.tight, a.solid)
    if term.op == "mod":
        return _mod(bounds(term.args[0], at), _constant(term.args[1]))
    if term.op == "abs":
        return _abs(bounds(term.args[0], at))
    out = bounds(term.args[0], at)
    for other in term.args[1:]:
        out = _join(term.op, out, bounds(other, at), term.apart)
    return out


def _mod(a: Range, p: int) -> Range:
    low = a.lo // p
    wraps = a.hi // p != low
    lo, hi = np.where(wraps, 0, a.lo - low * p), np.where(wraps, p - 1, a.hi - low * p)
    # A solid range that wraps passes p - 1 and 0; it has no gap if it is at least p long.
    tight = np.where(wraps, a.solid, a.tight)
    return Range(lo, hi, tight, a.solid & (~wraps | (a.hi - a.lo + 1 >= p)))


def _abs(a: Range) -> Range:
    over = (a.lo < 0) & (a.hi > 0)
    left, right = np.abs(a.lo), np.abs(a.hi)
    lo = np.where(over, 0, np.minimum(left, right))
    return Range(lo, np.maximum(left, right), np.where(over, a.solid, a.tight), a.solid)


def _join(op: str, a: Range, b: Range, apart: bool) -> Range:
    tight, solid = a.tight & b.tight & apart, a.solid & b.solid & apart
    if op == "add":
        return Range(a.lo + b.lo, a.hi + b.hi, tight, solid)
    if op == "mul":
        ends: list[Any] = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        lo, hi = reduce(np.minimum, ends), reduce(np.maximum, ends)
        # Multiples leave gaps, unless the factor is 1 or -1 or nothing varies.
        unit = ((np.abs(a.lo) == 1) & (a.lo == a.hi)) | ((np.abs(b.lo) == 1) & (b.lo == b.hi))
        return Range(lo, hi, tight, solid & (unit | (lo == hi)))
    pick = np.minimum if op == "min" else np.maximum
    return Range(pick(a.lo, b.lo), pick(a.hi, b.hi), tight, solid)
