"""Charts over length: what a model still finds, and what it takes, beside the original."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

from rewriter.pages.content import Chart, Line

# metric -> (what its parts are named like, title, unit of the length)
_PARTS: Mapping[str, tuple[str, str, str]] = {
    "pass key": (r"(\d+) tokens, depth .*", "Pass keys found, by length", "tokens"),
    "associative recall": (r"(\d+) pairs", "Values recalled, by number of pairs", "pairs"),
    "nested lists": (r"(\d+) tokens", "Nested lists solved, by length", "tokens"),
}
_NAMED = re.compile(r"(?P<what>[\w ]+) at (?P<length>\d+) tokens, (?P<unit>\w+)")


def by_length(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    """Shares that were found by length, then times and cache by length; a line a model.

    A chart needs two lengths at least.
    """
    for metric, (pattern, title, unit) in _PARTS.items():
        lines = []
        for name, row in models.items():
            groups: dict[float, list[float]] = {}
            for label, value in ((row.get(metric) or {}).get("parts") or {}).items():
                found = re.fullmatch(pattern, label)
                if found and isinstance(value, int | float):
                    groups.setdefault(float(found[1]), []).append(float(value))
            lines.append(Line(name, tuple((x, mean(ys)) for x, ys in sorted(groups.items()))))
        yield from _chart(title, unit, "share", lines, log_y=False)
    yield from _named(models)


_Point = tuple[float, float, float, float]


def _named(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    kinds: dict[tuple[str, str], dict[str, list[_Point]]] = {}
    for name, row in models.items():
        for metric, measured in row.items():
            found = _NAMED.fullmatch(metric)
            value, low, high = (measured.get(key) for key in ("value", "low", "high"))
            if found and all(isinstance(x, int | float) for x in (value, low, high)):
                points = kinds.setdefault((found["what"], found["unit"]), {}).setdefault(name, [])
                points.append((float(found["length"]), float(value), float(low), float(high)))
    for (what, unit), of_models in kinds.items():
        lines = []
        for name, points in of_models.items():
            ordered = sorted(points)
            spread = tuple((low, high) for _, _, low, high in ordered)
            lines.append(Line(name, tuple((x, y) for x, y, _, _ in ordered), spread))
        title = f"{what[0].upper()}{what[1:]}, by length"
        yield from _chart(title, "tokens", unit, lines, log_y=True)


def _chart(title: str, x: str, y: str, lines: list[Line], log_y: bool) -> Iterator[Chart]:
    drawn = tuple(line for line in lines if len(line.points) > 1)
    if drawn:
        yield Chart(title, x, y, drawn, log_x=True, log_y=log_y)
