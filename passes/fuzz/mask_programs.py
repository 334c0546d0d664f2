"""Random masks in random spellings: attention programs whose mask is known pair by pair.

A predicate is a few conditions joined by and, now and then by or or not; most are such as models
have, some are like none. Each condition is written in one of several ways. What the matcher says of
a program must be its mask, or that it does not know; see `judge`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from rewriter.ir.given import has_labels, labels_of
from rewriter.ir.mask import CausalOrGroup, Mask
from rewriter.passes.capture import Captured
from rewriter.passes.fuzz.mask_conditions import (
    Condition,
    Given,
    Tensor,
    block_causal,
    causal,
    chunk,
    dilated,
    documents,
    given_prefix,
    local,
    odd,
    padding,
    prefix,
    sinks,
    strided,
    window,
)
from rewriter.passes.match import match

Answer = Literal["right", "opaque", "wrong"]

LENGTH = 12
_CHANNELS, _HEADS = 8, 2


@dataclass(frozen=True)
class Predicate:
    """Conditions with how each is joined to those before it, and how scores are masked."""

    parts: tuple[tuple[str, Condition, int], ...]
    apply: str

    @property
    def given(self) -> Given:
        return next((c.given for _, c, _ in self.parts if c.given), "")

    def allowed(self, n: int, given: Tensor | None, plain: bool = False) -> Tensor:
        """(N, N) or (B, N, N) bool; `plain` takes the first spelling of every condition."""
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        out: Tensor | None = None
        for join, condition, spelling in self.parts:
            part = condition.spellings[0 if plain else spelling](i, j, given)
            if join == "not":
                part = ~part
            if out is None:
                out = part
            else:
                out = out | part if join == "or" else out & part
        assert out is not None
        return out

    def describe(self) -> str:
        """For people: 'causal and window 5 (spelling 1); where'."""
        words = [f"{join} {c.name} ({at})" for join, c, at in self.parts]
        return " ".join(words) + f"; {self.apply}"


def random_predicate(rng: random.Random) -> Predicate:
    """One to three conditions; at most one of them reads an input."""

    def size() -> int:
        return rng.choice([rng.randint(2, 9), rng.randint(2, 40), rng.choice([16, 32, 64, 128])])

    local_: list[Callable[[], Condition]] = [
        lambda: window(size()),
        lambda: local(size()),
        lambda: chunk(size()),
        lambda: block_causal(size()),
        lambda: sinks(size(), rng.randint(1, 6)),
        lambda: dilated(rng.randint(2, 6)),
        lambda: strided(size(), rng.randint(2, 9)),
        lambda: prefix(size()),
    ]
    from_input: list[Callable[[], Condition]] = [documents, documents, given_prefix, padding]
    chosen: list[Condition] = []
    if rng.random() < 0.6:
        chosen.append(causal())
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        chosen.append(rng.choice(local_)())
    if rng.random() < 0.3:
        chosen.append(rng.choice(from_input)())
    if rng.random() < 0.15 or not chosen:
        chosen.append(odd(rng))
    rng.shuffle(chosen)
    parts = []
    for at, condition in enumerate(chosen):
        draw = rng.random()
        join = "or" if at and draw < 0.12 else "not" if draw > 0.96 else "and"
        parts.append((join, condition, rng.randrange(len(condition.spellings))))
    return Predicate(tuple(parts), rng.choice(sorted(APPLY)))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.5


APPLY: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=m, scale=0.5
    ),
    "sdpa_added": lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(m.shape).masked_fill(~m, -torch.inf), scale=0.5
    ),
    "fill": lambda q, k, v, m: _scores(q, k).masked_fill(~m, -1e9).softmax(-1) @ v,
    "where": lambda q, k, v, m: torch.where(m, _scores(q, k), -torch.inf).softmax(-1) @ v,
    "added": lambda q, k, v, m: (
        (_scores(q, k) + (1.0 - m.float()) * torch.finfo(torch.float32).min).softmax(-1) @ v
    ),
}


class Program(nn.Module):
    """Self attention of two heads under one predicate."""

    def __init__(self, predicate: Predicate) -> None:
        super().__init__()
        self.predicate = predicate
        self.qkv = nn.Linear(_CHANNELS, 3 * _CHANNELS)
        self.out = nn.Linear(_CHANNELS, _CHANNELS)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in parts)
        seen = self.predicate.allowed(x.shape[1], given)
        seen = seen[None, None] if seen.dim() == 2 else seen[:, None]
        mixed = APPLY[self.predicate.apply](q, k, v, seen)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def given_for(kind: Given, n: int, seed: int = 0) -> Tensor | None:
    """(2, n) int64 such as callers pass: documents side by side, a prefix, padding on the right."""
    rng = random.Random(f"{kind}/{n}/{seed}")
    rows: list[list[int]] = []
    for _ in range(2):
        if kind == "documents":
            row = [0]
            for _ in range(n - 1):
                row.append(row[-1] + (rng.random() < 0.2))
            rows.append(row)
        elif kind == "prefix":
            p = rng.randint(1, max(n // 2, 1))
            rows.append([0] * p + [1] * (n - p))
        elif kind == "padding":
            p = rng.randint(n // 2, n)
            rows.append([1] * p + [0] * (n - p))
    return torch.tensor(rows) if rows else None


def arguments(predicate: Predicate, n: int = LENGTH) -> tuple[Tensor, ...]:
    """Example call of a program. Nothing is padded in it, as when models are captured."""
    x = torch.randn(2, n, _CHANNELS, generator=torch.Generator().manual_seed(0))
    given = given_for(predicate.given, n)
    if given is None:
        return (x,)
    return x, torch.ones_like(given) if predicate.given == "padding" else given


@dataclass(frozen=True)
class Verdict:
    """What the matcher said of a program."""

    answer: Answer
    said: str
    why: str = field(default="", compare=False)


def judge(
    predicate: Predicate, capture: Callable[[nn.Module, tuple[Tensor, ...]], Captured]
) -> Verdict:
    """Match the program of a predicate and hold what is found against it, pair by pair."""
    found = match(capture(Program(predicate), arguments(predicate)))
    if not found.matches:
        return Verdict("opaque", "; ".join(m.reason for m in found.misses))
    (item,) = found.matches
    mask = item.site.mask
    if mask.opaque is not None:
        return Verdict("opaque", mask.describe())
    if len(item.site.terms) != 1 or item.site.has_bias:
        return Verdict("wrong", mask.describe(), f"terms {item.site.terms}")
    # A mask says which keys are padding, not which number marks them.
    wrong = [_differs(predicate, mask, marked) for marked in ((1, 0) if mask.padding else (1,))]
    if None in wrong:
        return Verdict("right", mask.describe())
    return Verdict("wrong", mask.describe(), f"at length {wrong[0]}")


def _differs(predicate: Predicate, mask: Mask, marked: int) -> int | None:
    """The first length at which a description is not the predicate; `marked` keys are valid."""
    for n in LENGTHS:
        for seed in range(3 if predicate.given else 1):
            given = given_for(predicate.given, n, seed)
            true = predicate.allowed(n, given, plain=True)
            said = _said(mask, n, true, given if predicate.given == "padding" else None, marked)
            if said is None or not _equal(true, said):
                return n
    return None


LENGTHS = (1, 2, 7, 40, 130, 290)


def _said(mask: Mask, n: int, true: Tensor, padding: Tensor | None, marked: int) -> Tensor | None:
    """(1 or B, N, N) that the description allows; None if it asks for an input there is not.

    Which tokens a document or group holds is read off the mask when a model is called, so here too:
    the description is right if some partition makes it the mask.
    """
    steps = torch.arange(n)
    out = mask.dense(steps, steps)[None]
    if mask.padding:
        if padding is None:
            return None
        out = mask.dense(steps, steps, padding == marked)[:, 0]
    if has_labels(mask):
        allow = true if true.dim() == 3 else true[None]
        real = torch.ones(allow.shape[:2], dtype=torch.bool)
        labels = labels_of(mask, allow, real if padding is None else padding == marked)
        if labels is None:
            return None
        same = labels[:, :, None] == labels[:, None, :]
        out = out | same if any(isinstance(a, CausalOrGroup) for a in mask.atoms) else out & same
    return out


def _equal(true: Tensor, said: Tensor) -> bool:
    return bool((true == said).all())  # (N, N) or (B, N, N) beside (1 or B, N, N)


def predicates(count: int, seed: int) -> Sequence[Predicate]:
    """Random predicates, each from a generator of its own."""
    return [random_predicate(random.Random(f"{seed}/mask/{n}")) for n in range(count)]
