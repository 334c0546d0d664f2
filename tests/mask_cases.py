"""Predicates twice: in sympy, and as plain arithmetic on integer arrays that knows nothing of it.

The plain form takes (h, i, j) as numpy arrays or torch tensors that broadcast together.
"""

# ruff: noqa: SIM300 (the positions are variables, not constants)
from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch
from sympy import And, Eq, Max, Min, Mod, Not, Or, Xor

from rewriter.ir.lookup import lookup
from rewriter.ir.mask import H, I, J

Plain = Callable[[Any, Any, Any], Any]


class Case(NamedTuple):
    name: str
    mask: Any
    plain: Plain


def read(table: np.ndarray, *index: Any) -> Any:
    """table[index], False outside, for arrays of either library."""
    if torch.is_tensor(index[-1]):
        # A loop over the entries also runs under vmap, where indexing by a tensor may not.
        out = torch.zeros((), dtype=torch.bool)
        for at in np.argwhere(table):
            hit = torch.ones((), dtype=torch.bool)
            for x, n in zip(index, at.tolist(), strict=True):
                hit = hit & (x == n)
            out = out | hit
        return out
    index = np.broadcast_arrays(*index)
    inside = np.all([(x >= 0) & (x < n) for x, n in zip(index, table.shape, strict=True)], axis=0)
    clipped = tuple(np.clip(x, 0, n - 1) for x, n in zip(index, table.shape, strict=True))
    return table[clipped] & inside


@lru_cache
def named(n: int) -> list[Case]:
    """The static masks of the catalogue at sizes that matter for a sequence of about n tokens."""
    rng = np.random.default_rng(0)
    causal = J <= I
    w, s, c, d, width = 9, 3, 8, 3, 10
    g, blocks = n // 4, -(-n // c)
    glob = rng.random(n) < 0.1
    bi, bj = I // c, J // c
    number = np.arange(blocks)
    random_blocks = rng.random((2, blocks, blocks)) < 0.2
    hop = number[:, None] ^ number
    butterfly = (hop & (hop - 1)) == 0
    yi, xi, yj, xj = I // width, Mod(I, width), J // width, Mod(J, width)
    shift, high = 2, -(-n // width)

    def rolled(x: Any, size: int) -> Any:
        return Mod(x - shift, size) // 4

    def halo(y: Any, x: Any) -> Any:
        return And(c * (y // c) - s <= x, x < c * (y // c) + c + s)

    def swin(h: Any, i: Any, j: Any) -> Any:
        y, x, v, u = i // width, i % width, j // width, j % width
        near = ((y - shift) % high // 4 == (v - shift) % high // 4) & (
            (x - shift) % width // 4 == (u - shift) % width // 4
        )
        return near & ((y < shift) == (v < shift)) & ((x < shift) == (u < shift))

    def neighbourhood(h: Any, i: Any, j: Any) -> Any:
        lowest = i - 3
        lowest = np.clip(lowest, 0, n - 7) if isinstance(i, np.ndarray) else lowest.clamp(0, n - 7)
        return (lowest <= j) & (j < lowest + 7)

    start = Min(Max(I - 3, 0), n - 7)
    swin_mask = And(
        Eq(rolled(yi, high), rolled(yj, high)),
        Eq(rolled(xi, width), rolled(xj, width)),
        sympy.Equivalent(yi < shift, yj < shift),
        sympy.Equivalent(xi < shift, xj < shift),
    )
    return [
        Case("full", sympy.true, lambda h, i, j: (i == i) & (j == j)),
        Case("nothing", sympy.false, lambda h, i, j: (i != i) & (j == j)),
        Case("causal", causal, lambda h, i, j: j <= i),
        Case("swa", And(causal, I - J < w), lambda h, i, j: (j <= i) & (i - j < w)),
        Case("swa_bidir", sympy.Abs(I - J) <= w, lambda h, i, j: abs(i - j) <= w),
        Case(
            "sink_swa",
            And(causal, Or(I - J < w, J < s)),
            lambda h, i, j: (j <= i) & ((i - j < w) | (j < s)),
        ),
        Case(
            "dilated",
            And(causal, Eq(Mod(I - J, d), 0), I - J < w * d),
            lambda h, i, j: (j <= i) & ((i - j) % d == 0) & (i - j < w * d),
        ),
        Case(
            "strided",
            And(causal, Or(I - J < w, Eq(Mod(I - J, w), 0))),
            lambda h, i, j: (j <= i) & ((i - j < w) | ((i - j) % w == 0)),
        ),
        Case(
            "fixed",
            And(causal, Or(Eq(bi, bj), Mod(J, c) >= c - 2)),
            lambda h, i, j: (j <= i) & ((i // c == j // c) | (j % c >= c - 2)),
        ),
        Case("chunked", And(causal, Eq(bi, bj)), lambda h, i, j: (j <= i) & (i // c == j // c)),
        Case(
            "s2",
            And(
                causal,
                Or(
                    And(H < 1, Eq(I // g, J // g)),
                    And(H >= 1, Eq((I + g // 2) // g, (J + g // 2) // g)),
                ),
            ),
            lambda h, i, j: (
                (j <= i)
                & (
                    ((h < 1) & (i // g == j // g))
                    | ((h >= 1) & ((i + g // 2) // g == (j + g // 2) // g))
                )
            ),
        ),
        Case(
            "sf",
            And(causal, Or(Eq(I // g, J // g), J < 4)),
            lambda h, i, j: (j <= i) & ((i // g == j // g) | (j < 4)),
        ),
        Case(
            "longformer",
            Or(sympy.Abs(I - J) <= w // 2, lookup(glob, J), lookup(glob, I)),
            lambda h, i, j: (abs(i - j) <= w // 2) | read(glob, j) | read(glob, i),
        ),
        Case(
            "bigbird",
            Or(
                *(Eq(x, e) for x in (bi, bj) for e in (0, blocks - 1)),
                sympy.Abs(bi - bj) <= 1,
                lookup(random_blocks, H, bi, bj),
            ),
            lambda h, i, j: (
                (i // c == 0)
                | (i // c == blocks - 1)
                | (j // c == 0)
                | (j // c == blocks - 1)
                | (abs(i // c - j // c) <= 1)
                | read(random_blocks, h, i // c, j // c)
            ),
        ),
        Case(
            "scout",
            Or(Eq(I, J), And(Eq(Mod(J, 10), 9), J < I)),
            lambda h, i, j: (j == i) | ((j % 10 == 9) & (j < i)),
        ),
        Case(
            "butterfly",
            And(causal, lookup(butterfly, bi, bj)),
            lambda h, i, j: (j <= i) & read(butterfly, i // c, j // c),
        ),
        Case(
            "axial",
            Or(Eq(yi, yj), Eq(xi, xj)),
            lambda h, i, j: (i // width == j // width) | (i % width == j % width),
        ),
        Case(
            "window_2d",
            And(Eq(yi // 4, yj // 4), Eq(xi // 4, xj // 4)),
            lambda h, i, j: (
                (i // width // 4 == j // width // 4) & (i % width // 4 == j % width // 4)
            ),
        ),
        Case("swin_shift", swin_mask, swin),
        Case(
            "halo",
            And(halo(yi, yj), halo(xi, xj)),
            lambda h, i, j: (
                (i // width // c * c - s <= j // width)
                & (j // width < i // width // c * c + c + s)
                & (i % width // c * c - s <= j % width)
                & (j % width < i % width // c * c + c + s)
            ),
        ),
        Case("neighbourhood", And(start <= J, start + 7 > J), neighbourhood),
        Case(
            "block_distance",
            And(I // 5 - J // 5 >= -1, I // 5 - J // 5 <= 3),
            lambda h, i, j: (i // 5 - j // 5 >= -1) & (i // 5 - j // 5 <= 3),
        ),
        Case("head_stripes", Eq(Mod(H, 2), Mod(J, 2)), lambda h, i, j: (h % 2 == j % 2) & (i == i)),
    ]


def drawn(rng: random.Random, n: int, depth: int = 3) -> Case:
    """A random composition of atoms with and, or, not, exclusive or."""
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(_pool(n))
    kind = rng.choice(["and", "and", "or", "or", "not", "xor"])
    a = drawn(rng, n, depth - 1)
    if kind == "not":
        return Case(f"~({a.name})", Not(a.mask), lambda h, i, j: a.plain(h, i, j) ^ True)
    b = drawn(rng, n, depth - 1)
    if kind == "and":
        both = And(a.mask, b.mask)
        return Case(
            f"({a.name} & {b.name})", both, lambda h, i, j: a.plain(h, i, j) & b.plain(h, i, j)
        )
    if kind == "or":
        either = Or(a.mask, b.mask)
        return Case(
            f"({a.name} | {b.name})", either, lambda h, i, j: a.plain(h, i, j) | b.plain(h, i, j)
        )
    one = Xor(a.mask, b.mask)
    return Case(f"({a.name} ^ {b.name})", one, lambda h, i, j: a.plain(h, i, j) ^ b.plain(h, i, j))


def _same(a: Any, b: Any) -> Any:
    """a == b as it stands: sympy needs long to find that it cannot simplify it."""
    return Eq(a, b, evaluate=False)


def _window(rng: random.Random, n: int) -> Case:
    w = rng.randint(1, n)
    return rng.choice(
        [
            Case(f"i-j<{w}", I - J < w, lambda h, i, j: i - j < w),
            Case(f"|i-j|<={w}", abs(I - J) <= w, lambda h, i, j: abs(i - j) <= w),
            Case(f"j<{w}", J < w, lambda h, i, j: (j < w) & (i == i)),
            Case(f"i>={w}", I >= w, lambda h, i, j: (i >= w) & (j == j)),
        ]
    )


def _order(rng: random.Random, n: int) -> Case:
    d, t = sympy.Integer(rng.randint(2, 9)), rng.randrange(3)
    d_ = int(d)
    return rng.choice(
        [
            Case("j<=i", J <= I, lambda h, i, j: j <= i),
            Case("j<i", J < I, lambda h, i, j: j < i),
            Case("j==i", _same(I, J), lambda h, i, j: j == i),
            Case(f"2j<=i+{t}", 2 * J <= I + t, lambda h, i, j: 2 * j <= i + t),
            Case(f"j<=i/{d}", J <= I / d, lambda h, i, j: j * d_ <= i),
        ]
    )


def _chunk(rng: random.Random, n: int) -> Case:
    c = rng.randint(1, n // 2)
    shift = rng.choice([0, rng.randrange(c)])
    return Case(
        f"(i+{shift})//{c}==(j+{shift})//{c}",
        _same((I + shift) // c, (J + shift) // c),
        lambda h, i, j: (i + shift) // c == (j + shift) // c,
    )


def _chunk_distance(rng: random.Random, n: int) -> Case:
    c = rng.randint(1, n // 2)
    low, high = sorted((rng.randint(-3, 3), rng.randint(-3, 3)))
    distance = I // c - J // c
    return Case(
        f"{low}<=i//{c}-j//{c}<={high}",
        And(low <= distance, distance <= high),
        lambda h, i, j: (low <= i // c - j // c) & (i // c - j // c <= high),
    )


def _modulus(rng: random.Random, n: int) -> Case:
    d = rng.randint(2, 9)
    r = rng.randrange(d)
    return rng.choice(
        [
            Case(f"j%{d}=={r}", _same(Mod(J, d), r), lambda h, i, j: (j % d == r) & (i == i)),
            Case(f"i%{d}<={r}", Mod(I, d) <= r, lambda h, i, j: (i % d <= r) & (j == j)),
            Case(f"(i-j)%{d}=={r}", _same(Mod(I - J, d), r), lambda h, i, j: (i - j) % d == r),
        ]
    )


def _head(rng: random.Random, n: int) -> Case:
    t, w = rng.randrange(3), rng.randint(1, n)
    return rng.choice(
        [
            Case(f"h<{t}", H < t, lambda h, i, j: (h < t) & (i == i) & (j == j)),
            Case("h%2==1", _same(Mod(H, 2), 1), lambda h, i, j: (h % 2 == 1) & (i == i) & (j == j)),
            Case(f"max(i,{w})>j+h", Max(I, w) > J + H, lambda h, i, j: (i > j + h) | (w > j + h)),
        ]
    )


def _table(rng: random.Random, n: int) -> Case:
    c = rng.randint(2, 15)
    table = np.random.default_rng(rng.randrange(1 << 30)).random((2, 4, 5)) < 0.4
    return Case(
        f"T[h,i//{c},j//{c}]",
        lookup(table, H, I // c, J // c),
        lambda h, i, j: read(table, h, i // c, j // c),
    )


def _plane(rng: random.Random, n: int) -> Case:
    wide = rng.randint(2, 9)
    return rng.choice(
        [
            Case(
                f"x_i//2==x_j//2 of {wide}",
                _same(Mod(I, wide) // 2, Mod(J, wide) // 2),
                lambda h, i, j: i % wide // 2 == j % wide // 2,
            ),
            Case(
                f"|y_i-y_j|<2 of {wide}",
                abs(I // wide - J // wide) < 2,
                lambda h, i, j: abs(i // wide - j // wide) < 2,
            ),
        ]
    )


@lru_cache
def _pool(n: int) -> list[Case]:
    """Atoms of every kind with random constants, built once: sympy takes milliseconds for each."""
    rng = random.Random(7)
    kinds = (_window, _order, _chunk, _chunk_distance, _modulus, _head, _table, _plane)
    return [kind(rng, n) for kind in kinds for _ in range(24)]
