"""Conditions that masks are made of, each in several spellings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Tensor = torch.Tensor
Write = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(i (N, 1), j (1, N), input (B, N) or None) to bool, broadcast to (N, N) or (B, N, N)."""
Given = Literal["", "documents", "prefix", "padding"]


@dataclass(frozen=True)
class Condition:
    """One condition, its plain meaning first, then other spellings of the same.

    Attributes:
        given: what the program's input holds, if the condition reads it.
    """

    name: str
    spellings: tuple[Write, ...]
    given: Given = ""


def _shift_of(c: int) -> int | None:
    return c.bit_length() - 1 if c & (c - 1) == 0 else None


def causal() -> Condition:
    return Condition(
        "causal",
        (
            lambda i, j, g: j <= i,
            lambda i, j, g: ~(i < j),
            lambda i, j, g: torch.ones(i.shape[0], j.shape[1]).tril() != 0,
            lambda i, j, g: (i - j).clamp(min=-1) >= 0,
        ),
    )


def window(w: int) -> Condition:
    return Condition(
        f"window {w}",
        (
            lambda i, j, g: i - j < w,
            lambda i, j, g: j > i - w,
            lambda i, j, g: torch.ones(i.shape[0], j.shape[1], dtype=torch.bool).triu(1 - w),
        ),
    )


def local(r: int) -> Condition:
    return Condition(
        f"local {r}",
        (
            lambda i, j, g: (i - j).abs() <= r,
            lambda i, j, g: (i - j <= r) & (j - i <= r),
            lambda i, j, g: (i - j) ** 2 <= r * r,
        ),
    )


def chunk(c: int) -> Condition:
    spellings: list[Write] = [
        lambda i, j, g: i // c == j // c,
        lambda i, j, g: (i - i % c) == (j - j % c),
        lambda i, j, g: torch.div(i, c, rounding_mode="trunc") == j.div(c, rounding_mode="floor"),
    ]
    shift = _shift_of(c)
    if shift is not None:
        spellings.append(lambda i, j, g: (i >> shift) == (j >> shift))
    return Condition(f"chunk {c}", tuple(spellings))


def block_causal(c: int) -> Condition:
    return Condition(
        f"block causal {c}",
        (lambda i, j, g: j // c <= i // c, lambda i, j, g: j < (i // c + 1) * c),
    )


def sinks(w: int, s: int) -> Condition:
    return Condition(
        f"window {w} or sinks {s}",
        (
            lambda i, j, g: (i - j < w) | (j < s),
            lambda i, j, g: ~((i - j >= w) & (j >= s)),
            lambda i, j, g: torch.where(j < s, True, j > i - w),
        ),
    )


def dilated(d: int) -> Condition:
    return Condition(
        f"every {d}",
        (lambda i, j, g: (i - j) % d == 0, lambda i, j, g: i % d == j % d),
    )


def strided(w: int, d: int) -> Condition:
    return Condition(
        f"window {w} or every {d}",
        (
            lambda i, j, g: (i - j < w) | ((i - j) % d == 0),
            lambda i, j, g: torch.logical_or(i % d == j % d, i < j + w),
        ),
    )


def prefix(p: int) -> Condition:
    return Condition(
        f"causal or prefix {p}",
        (
            lambda i, j, g: (j <= i) | (j < p),
            lambda i, j, g: ~((j > i) & (j >= p)),
            lambda i, j, g: j <= torch.maximum(i, torch.full_like(i, p - 1)),
        ),
    )


def documents() -> Condition:
    return Condition(
        "documents",
        (
            lambda i, j, g: _given(g)[:, :, None] == _given(g)[:, None, :],
            lambda i, j, g: (_given(g).unsqueeze(-1) - _given(g).unsqueeze(-2)) == 0,
            lambda i, j, g: ~(_given(g)[:, :, None] != _given(g)[:, None, :]),
        ),
        "documents",
    )


def given_prefix() -> Condition:
    """The input holds 0 for the tokens of the prefix and 1 for the rest."""
    return Condition(
        "causal or given prefix",
        (
            lambda i, j, g: (j <= i) | both(_given(g) == 0),
            lambda i, j, g: (
                (j <= i) | ((1 - _given(g))[:, None, :] * (1 - _given(g))[:, :, None] == 1)
            ),
        ),
        "prefix",
    )


def padding() -> Condition:
    return Condition(
        "padding",
        (
            lambda i, j, g: (_given(g) == 1)[:, None, :],
            lambda i, j, g: _given(g).bool().unsqueeze(1),
            lambda i, j, g: (1.0 - _given(g).float())[:, None] < 0.5,
        ),
        "padding",
    )


def _given(g: Tensor | None) -> Tensor:
    assert g is not None
    return g


def both(marked: Tensor) -> Tensor:
    return marked[:, :, None] & marked[:, None, :]


def odd(rng: random.Random) -> Condition:
    """Conditions that no mask of the algebra is."""
    a, b, c = rng.randint(2, 30), rng.randint(2, 9), rng.randint(3, 7)
    options: list[tuple[str, Write]] = [
        ("strictly causal", lambda i, j, g: j < i),
        ("later", lambda i, j, g: j >= i),
        (f"some keys of {b}", lambda i, j, g: (j % b != 1) | (i == j)),
        (f"some rows of {b}", lambda i, j, g: (i % b == 0) | (j <= i)),
        (f"shifted chunk {a}", lambda i, j, g: (i + b) // a == (j + b) // a),
        (f"nested {a} {c}", lambda i, j, g: ((i // a) % c != c - 1) | (i == j)),
        (f"nested keys {a} {c}", lambda i, j, g: ((j // a) % c == 0) | (i - j < a)),
        (f"product {a * b}", lambda i, j, g: i * j < a * b * 10),
        (f"sum {a}", lambda i, j, g: i + j < 2 * a + 50),
        (f"far {a}", lambda i, j, g: (i - j < a) | (i - j > 3 * a)),
        (f"late {a}", lambda i, j, g: (i < 2 * a) | (j >= b)),
        (f"half {a}", lambda i, j, g: 2 * j <= i + a),
        (f"chunks apart {a}", lambda i, j, g: (i // a - j // a).abs() <= 1),
        (f"power {b}", lambda i, j, g: ((i - j) & (i - j - 1)) == 0),
    ]
    name, write = rng.choice(options)
    return Condition(name, (write,))
