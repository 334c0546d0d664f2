"""A measured number with its sample size and confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
_SEED = 20_000  # of the resampling only, so that an interval is the same on every run
Unit = tuple[float, float]
Transform = Literal["mean", "exp"]
_TRANSFORMS: Mapping[str, Callable[[Any], Any]] = {"mean": lambda x: x, "exp": np.exp}


@dataclass(frozen=True)
class Measurement:
    """A number and how far to trust it.

    Attributes:
        name: what was measured.
        value: the number.
        low, high: 95 % confidence interval.
        samples: independent units (rows of text, passages, questions).
        tokens: predictions that were scored, over all samples.
        interval: how the interval was made.
        parts: the number on parts of the samples, such as 'tokens 0-255'.
        units: (sum, weight) of each sample, so that two models measured on the same samples can be
            compared in pairs; the number is the transform of sum over weight.
        transform: 'mean', or 'exp' for perplexities.
        better: which direction is good.
    """

    name: str
    value: float
    low: float
    high: float
    samples: int
    tokens: int
    interval: Literal["bootstrap", "wilson", "normal", "none"] = "bootstrap"
    parts: Mapping[str, float] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()
    transform: Transform = "mean"
    better: Literal["low", "high"] = "low"

    def to_json(self) -> dict[str, Any]:
        """Plain values; the units are left out."""
        return {
            "name": self.name,
            "value": _plain(self.value),
            "low": _plain(self.low),
            "high": _plain(self.high),
            "samples": self.samples,
            "tokens": self.tokens,
            "interval": self.interval,
            "parts": {key: _plain(value) for key, value in self.parts.items()},
            "better": self.better,
        }

    def describe(self) -> str:
        """'1.19 (1.10 to 1.31)'."""
        if self.interval == "none":
            return _short(self.value)
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def pooled(
    name: str,
    units: Sequence[Unit],
    *,
    tokens: int,
    transform: Transform = "mean",
    parts: Mapping[str, float] | None = None,
    better: Literal["low", "high"] = "low",
) -> Measurement:
    """Transform of (sum of sums / sum of weights), with a bootstrap over the units."""
    array = np.asarray(units, dtype=np.float64).reshape(-1, 2)
    apply = _TRANSFORMS[transform]
    value = float(apply(array[:, 0].sum() / array[:, 1].sum()))
    counts = _resamples(len(array))
    means = (counts @ array[:, 0]) / (counts @ array[:, 1])
    low, high = np.quantile(apply(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measurement(
        name=name,
        value=value,
        low=float(low),
        high=float(high),
        samples=len(array),
        tokens=tokens,
        interval="bootstrap" if len(array) > 1 else "none",
        parts=dict(parts or {}),
        units=tuple((float(a), float(b)) for a, b in array),
        transform=transform,
        better=better,
    )


def proportion(
    name: str, hits: Sequence[bool], parts: Mapping[str, float] | None = None
) -> Measurement:
    """Share of hits with the Wilson score interval, which stays honest at 0 and 1."""
    n, p, z = len(hits), sum(hits) / len(hits), 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Measurement(
        name=name,
        value=p,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
        samples=n,
        tokens=n,
        interval="wilson",
        parts=dict(parts or {}),
        units=tuple((float(hit), 1.0) for hit in hits),
        better="high",
    )


def ratio(student: Measurement, teacher: Measurement) -> Measurement:
    """Student over teacher on the same samples, resampled in pairs.

    Raises:
        ValueError: the two were not measured on the same samples.
    """
    if len(student.units) != len(teacher.units) or student.transform != teacher.transform:
        raise ValueError(f"'{student.name}' was measured on other samples than '{teacher.name}'")
    a = np.asarray(student.units, dtype=np.float64).reshape(-1, 2)
    b = np.asarray(teacher.units, dtype=np.float64).reshape(-1, 2)
    apply = _TRANSFORMS[student.transform]
    counts = _resamples(len(a))
    with np.errstate(divide="ignore", invalid="ignore"):
        top = apply((counts @ a[:, 0]) / (counts @ a[:, 1]))
        spread = top / apply((counts @ b[:, 0]) / (counts @ b[:, 1]))
    low, high = np.nanquantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measurement(
        name=f"{student.name} / teacher",
        value=student.value / teacher.value if teacher.value else math.nan,
        low=float(low),
        high=float(high),
        samples=len(a),
        tokens=student.tokens,
        interval="bootstrap" if len(a) > 1 else "none",
        better=student.better,
    )


def _resamples(count: int) -> Any:
    """(RESAMPLES, count): how often each unit occurs in each resample."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES).astype(np.float64)
