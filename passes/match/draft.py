"""A core under construction: nodes with axis labels, before the axes have names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from rewriter.ir.site import ScoreStep, Spelling
from rewriter.passes.normalise.axes import Axes, Labels


@dataclass(frozen=True)
class Labelled:
    """A tensor node and the axes in its dimensions."""

    node: fx.Node
    labels: Labels


@dataclass(frozen=True)
class Sink:
    """One more column of the softmax, before or behind those of the keys.

    `axis` labels the widened dimension, `keys` the part of it that belongs to keys.
    """

    axis: tuple[int, ...]
    keys: tuple[int, ...]
    first: bool


@dataclass(frozen=True)
class Scores:
    """The way from the product of queries and keys to the softmax.

    `terms` carry the labels of the scores at the place where the term joins, aligned to the
    term's own dimensions.
    """

    query: Labelled
    key: Labelled
    steps: tuple[ScoreStep, ...]
    terms: tuple[Labelled, ...]
    softmax_dtype: str | None
    sink: Sink | None = None


@dataclass(frozen=True)
class Draft:
    """Everything structural about one core.

    Attributes:
        anchor: the softmax or attention node it was found at.
        query_axis, key_axis: token axes of queries and keys.
        channel, value_channel: axes of the two head widths.
        weights: the softmax result, if something outside the core uses it.
    """

    spelling: Spelling
    anchor: fx.Node
    axes: Axes
    query: Labelled
    key: Labelled
    value: Labelled
    output: Labelled
    query_axis: tuple[int, ...]
    key_axis: tuple[int, ...]
    channel: tuple[int, ...]
    value_channel: tuple[int, ...]
    steps: tuple[ScoreStep, ...]
    terms: tuple[Labelled, ...]
    softmax_dtype: str | None = None
    dropout: float = 0.0
    weights: Labelled | None = None
    causal_flag: bool = False
    normaliser: str = "softmax"


@dataclass
class Facts:
    """What has been understood so far, in plain words, for near misses.

    `step` is what the matcher is at: softmax, scores, values, axes, tokens (`STEPS`).
    """

    lines: list[str] = field(default_factory=list)
    step: str = "softmax"

    def add(self, line: str) -> None:
        self.lines.append(f"{self.step}: {line}")


Side = Literal["query", "key", "value"]
