"""What a search minimises: the plain loss on text and the loss on repeats of text long past.

Perplexity alone hardly notices that a model cannot look back, so both are always measured. A probe
is a passage, other text and the passage again, so that one row gives both losses.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from rewriter.errors import InputError
from rewriter.evaluate.quality import copy_rows
from rewriter.evaluate.scoring import logits_of


@dataclass(frozen=True)
class Score:
    """Mean losses in nats a token.

    Attributes:
        text: on the text between a passage and its repeat.
        copy: on passages that stood far back.
    """

    text: float
    copy: float

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
        passage: tokens that are repeated.
        gap: least and most tokens between a passage and its repeat, drawn for each draw.
        skip: tokens of the repeat that are not scored.
        samples: rows in one draw.
    """

    passage: int = 100
    gap: tuple[int, int] = (200, 700)
    skip: int = 10
    samples: int = 1


@dataclass(frozen=True)
class Objective:
    """Losses on random probes from a token stream.

    Attributes:
        stream: (tokens,) int64 text to take probes from; keep the text for the final judgement
            out of it.
        probes: sizes.
        copy_weight: weight of the copy loss in the total.
    """

    stream: torch.Tensor
    probes: Probes = Probes()
    copy_weight: float = 1.0

    def __post_init__(self) -> None:
        need = self.probes.passage + self.probes.gap[1]
        if self.stream.numel() < need:
            raise InputError(
                f"the search needs a text of at least {need} tokens; this one has "
                f"{self.stream.numel()}"
            )

    def losses(self, model: nn.Module, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, copy) mean losses on the probes of one draw: float32 scalars, differentiable."""
        p = self.probes
        rng = random.Random(draw)
        gap = rng.randint(*p.gap)
        rows = copy_rows(self.stream, p.samples, p.passage, gap, seed=draw)
        logits = logits_of(model, rows)
        far = p.passage + gap
        # the first tokens of the other text are left out too: nothing leads up to them
        return (
            _loss(logits, rows, p.passage + min(p.skip, gap - 1), far),
            _loss(logits, rows, far + p.skip, far + p.passage),
        )

    def total(self, model: nn.Module, draw: int) -> torch.Tensor:
        """The weighted sum of both losses, differentiable."""
        text, copy = self.losses(model, draw)
        return text + self.copy_weight * copy

    def score(self, model: nn.Module, draws: range) -> Score:
        """Mean losses over several draws, without gradients."""
        with torch.no_grad():
            pairs = [self.losses(model, draw) for draw in draws]
        return Score(
            sum(float(t) for t, _ in pairs) / len(pairs),
            sum(float(c) for _, c in pairs) / len(pairs),
        )

    def value(self, score: Score) -> float:
        return score.text + self.copy_weight * score.copy


def _loss(logits: torch.Tensor, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Mean loss of predicting the tokens at positions `start` to `stop` - 1."""
    targets = rows[:, start:stop].to(logits.device)
    kept = logits[:, start - 1 : stop - 1]
    return F.cross_entropy(kept.flatten(0, 1).float(), targets.flatten())
