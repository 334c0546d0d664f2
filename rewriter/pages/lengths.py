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


def _named(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    kinds: dict[tuple[str, str], dict[str, list[tuple[float, float, float, float]]]] = {}
    for name, row in models.items():
        for metric, measured in row.items():
            found = _NAMED.fullmatch(metric)
            if found and all(
                isinstance(measured[k], int | float) for k in ("value", "low", "high")
            ):
                point = (float(found["length"]), *(measured[k] for k in ("value", "low", "high")))
                lines = kinds.setdefault((found["what"], found["unit"]), {})
                lines.setdefault(name, []).append(point)
    for (what, unit), models_of in kinds.items():
        lines = [
            Line(
                name,
                tuple((x, y) for x, y, _, _ in sorted(points)),
                tuple((low, high) for _, _, low, high in sorted(points)),
            )
            for name, points in models_of.items()
        ]
        title = f"{what[0].upper()}{what[1:]}, by length"
        yield from _chart(title, "tokens", unit, lines, log_y=True)


def _chart(title: str, x: str, y: str, lines: list[Line], log_y: bool) -> Iterator[Chart]:
    drawn = tuple(line for line in lines if len(line.points) > 1)
    if drawn:
        yield Chart(title, x, y, drawn, log_x=True, log_y=log_y)
