"""What a search minimises: the plain loss on text and the loss on repeats of text long past.

Perplexity alone hardly notices that a model cannot look back, so both are always measured. A probe
is a piece of text and then some of its first passages again, in another order: one row gives both
losses, and several repeats.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn
from torch.nn import functional as F

from rewriter.errors import InputError
from rewriter.evaluate.scoring import logits_of

BEYOND = 20.0  # weight of the text loss beyond a limit, so that a limit is kept rather than traded


@dataclass(frozen=True)
class Score:
    """Mean losses in nats a token.

    Attributes:
        text: on the text between the passages and their repeats.
        copy: on passages that stood far back.
    """

    text: float
    copy: float

    @classmethod
    def over(cls, scores: Sequence[Score]) -> Score:
        """The mean."""
        return cls(mean(s.text for s in scores), mean(s.copy for s in scores))

    @property
    def perplexity(self) -> float:
        return math.exp(self.text)

    @property
    def copy_perplexity(self) -> float:
        return math.exp(self.copy)


@dataclass(frozen=True)
class Probes:
    """Sizes of the probes.

    Attributes:
        passage: tokens of a passage that is repeated.
        passages: how many follow each other at the start of a row and come again at its end.
        gap: least and most tokens between the passages and their repeats, drawn for each draw.
        skip: tokens of a repeat that are not scored.
        samples: rows in one draw.
    """

    passage: int = 100
    passages: int = 2
    gap: tuple[int, int] = (200, 700)
    skip: int = 10
    samples: int = 1

    @property
    def head(self) -> int:
        """Tokens of all passages."""
        return self.passages * self.passage

    def rows(self, stream: torch.Tensor, draw: int) -> torch.Tensor:
        """(samples, 2 * head + gap) int64: text from a random place, and its passages again."""
        rng = random.Random(draw)
        length = self.head + rng.randint(*self.gap)
        rows = []
        for _ in range(self.samples):
            start = rng.randint(0, stream.numel() - length)
            text = stream[start : start + length]
            again = list(torch.split(text[: self.head], self.passage))
            rng.shuffle(again)
            rows.append(torch.cat([text, *again]))
        return torch.stack(rows)


@dataclass(frozen=True)
class Objective:
    """Losses on random probes from a token stream.

    Attributes:
        stream: (tokens,) int64 text to take probes from; keep the text for the final judgement
            out of it.
        probes: sizes.
        copy_weight: weight of the copy loss in the total.
        limit: largest perplexity that is wanted, as a multiple of the exact model's on the same
            text; what is beyond it counts `BEYOND` times more. None: no limit.
    """

    stream: torch.Tensor
    probes: Probes = Probes()
    copy_weight: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        need = self.probes.head + self.probes.gap[1]
        if self.stream.numel() < need:
            raise InputError(
                f"the search needs a text of at least {need} tokens; this one has "
                f"{self.stream.numel()}"
            )

    def losses(self, model: nn.Module, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, copy) mean losses on the probes of one draw: float32 scalars, differentiable."""
        p = self.probes
        rows = p.rows(self.stream, draw)
        logits = logits_of(model, rows)
        far = rows.shape[1] - p.head
        repeats = [
            _loss(logits, rows, start + p.skip, start + p.passage)
            for start in range(far, far + p.head, p.passage)
        ]
        return _loss(logits, rows, p.head, far), torch.stack(repeats).mean()

    def total(self, model: nn.Module, draw: int) -> torch.Tensor:
        """The weighted sum of both losses, differentiable."""
        text, copy = self.losses(model, draw)
        return text + self.copy_weight * copy

    def score(self, model: nn.Module, draws: range) -> Score:
        """Mean losses over several draws, without gradients."""
        with torch.no_grad():
            pairs = [self.losses(model, draw) for draw in draws]
        return Score.over([Score(float(text), float(copy)) for text, copy in pairs])

    def value(self, score: Score, exact: Score | None = None) -> float:
        """What is minimised; `exact` is the score of the exact model, for the limit."""
        value = score.text + self.copy_weight * score.copy
        if self.limit is not None and exact is not None:
            value += BEYOND * max(0.0, score.text - exact.text - math.log(self.limit))
        return value


def _loss(logits: torch.Tensor, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Mean loss of predicting the tokens at positions `start` to `stop` - 1."""
    targets = rows[:, start:stop].to(logits.device)
    kept = logits[:, start - 1 : stop - 1]
    return F.cross_entropy(kept.flatten(0, 1).float(), targets.flatten())
