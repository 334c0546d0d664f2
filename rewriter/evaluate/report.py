"""Measurements of several models side by side: as JSON and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewriter.evaluate.ablation import NOTHING
from rewriter.evaluate.measurement import Measurement, ratio

TEACHER = "teacher"
Row = Mapping[str, Measurement]


@dataclass(frozen=True)
class QualityReport:
    """What was measured.

    Attributes:
        columns: model name ('teacher', 'undistilled', 'distilled', ...) -> metric -> measurement,
            in the order of display.
        ablation: branch that was switched off -> metric -> measurement, of one of the models.
        ablated: name of the model of the ablation.
        notes: sentences a reader of the numbers must know, such as what was left out.
    """

    columns: Mapping[str, Row]
    ablation: Mapping[str, Row] = field(default_factory=dict)
    ablated: str = ""
    notes: tuple[str, ...] = ()

    def relative(self, column: str, metric: str) -> Measurement | None:
        """A model's number over the teacher's, in pairs, or None if that makes no sense."""
        teacher = self.columns.get(TEACHER, {}).get(metric)
        measured = self.columns[column].get(metric)
        if teacher is None or measured is None or column == TEACHER or teacher.better == "high":
            return None
        return ratio(measured, teacher) if measured.units and teacher.units else None

    def to_json(self) -> dict[str, Any]:
        """Plain values: everything the tables show and the parts behind it."""
        columns: dict[str, Any] = {}
        for name, row in self.columns.items():
            columns[name] = {}
            for metric, measured in row.items():
                columns[name][metric] = measured.to_json()
                over = self.relative(name, metric)
                if over is not None:
                    columns[name][metric]["over_teacher"] = over.to_json()
        return {
            "models": columns,
            "ablation": {
                "model": self.ablated,
                "without": {
                    branch: {metric: m.to_json() for metric, m in row.items()}
                    for branch, row in self.ablation.items()
                },
            },
            "notes": list(self.notes),
        }

    def render(self) -> RenderableType:
        """Tables for a terminal."""
        parts: list[RenderableType] = [self._quality_table()]
        if self.ablation:
            parts += [Text(), self._ablation_table()]
        parts += [Text(note, style="dim") for note in self.notes]
        return Group(*parts)

    def _quality_table(self) -> Table:
        table = Table(title="Quality (95 % interval; ratio to the teacher)", title_justify="left")
        table.add_column("metric")
        table.add_column("good")
        table.add_column("samples", justify="right")
        for name in self.columns:
            table.add_column(name, justify="right")
        for metric in _union(self.columns):
            found = [row[metric] for row in self.columns.values() if metric in row]
            cells = [self._cell(name, metric) for name in self.columns]
            table.add_row(metric, found[0].better, str(found[0].samples), *cells)
        return table

    def _cell(self, column: str, metric: str) -> str:
        measured = self.columns[column].get(metric)
        if measured is None:
            return "-"
        over = self.relative(column, metric)
        return measured.describe() + (f"\n{over.value:.3f} x" if over is not None else "")

    def _ablation_table(self) -> Table:
        title = f"Branch ablation of '{self.ablated}': what each branch is worth"
        table = Table(title=title, title_justify="left")
        table.add_column("switched off")
        metrics = _union(self.ablation)
        for metric in metrics:
            table.add_column(metric, justify="right")
        for branch, row in self.ablation.items():
            name = branch if branch == NOTHING else f"branch '{branch}'"
            cells = [row[metric].describe() if metric in row else "-" for metric in metrics]
            table.add_row(name, *cells)
        return table


def _union(rows: Mapping[str, Row]) -> list[str]:
    names: list[str] = []
    for row in rows.values():
        names += [metric for metric in row if metric not in names]
    return names
