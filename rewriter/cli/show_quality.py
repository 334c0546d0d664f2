"""Measurements beside the teacher's, value over interval, so that three columns fit in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from rewriter.cli.tables import Column, heading, number, table

if TYPE_CHECKING:
    from rewriter.evaluate import Measurement, QualityReport

_SIGN = {"low": "lower is better", "high": "higher is better"}


def quality_view(report: QualityReport) -> list[RenderableType]:
    """A line a metric with its 95 % interval below it, then what each branch is worth."""
    names = list(report.columns)
    metrics = _metrics(report.columns)
    compared = "teacher" in names and len(names) > 1
    columns: list[Column] = ["metric", ("samples", "right")]
    columns += [(name, "right") for name in names]
    columns += [("ratio", "right")] if compared else []
    rows = []
    for metric in metrics:
        found = [report.columns[name].get(metric) for name in names]
        first = next(m for m in found if m is not None)
        row = [f"{metric}\n  {_SIGN[first.better]}", str(first.samples), *map(_cell, found)]
        if compared:
            row.append(_cell(report.relative(names[-1], metric)))
        rows.append(row)
    parts: list[RenderableType] = [heading("quality (below each figure its 95 % interval)")]
    parts.append(table(columns, rows))
    if report.ablation:
        parts += _branches(report)
    return [*parts, *(Text(f"\n{note}") for note in report.notes)]


def _branches(report: QualityReport) -> list[RenderableType]:
    metrics = _metrics(report.ablation)
    columns: list[Column] = ["switched off", *((metric, "right") for metric in metrics)]
    rows = [
        [branch, *(_cell(row.get(metric)) for metric in metrics)]
        for branch, row in report.ablation.items()
    ]
    return [heading("what each branch is worth"), table(columns, rows)]


def _metrics(rows: Mapping[str, Mapping[str, Measurement]]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows.values() for metric in row))


def _cell(measured: Measurement | None) -> str:
    """'1.19' over '1.1 to 1.31'."""
    if measured is None:
        return "-"
    if measured.interval == "none":
        return figure(measured.value)
    return f"{figure(measured.value)}\n{figure(measured.low)} to {figure(measured.high)}"


def figure(value: float) -> str:
    """Four significant digits where that is readable; rounding errors of a zero are zero."""
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1000 else number(value)
