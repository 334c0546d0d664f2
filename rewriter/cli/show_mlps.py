"""The MLP blocks of a model as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from rewriter.cli.show_sites import miss_lines
from rewriter.cli.tables import Column, bullets, heading, plural, table
from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import NearMiss


def mlps_view(mlps: Sequence[MlpSite], misses: Sequence[NearMiss]) -> list[RenderableType]:
    """All MLP blocks one a line, then what only looks like one."""
    parts: list[RenderableType] = [heading(plural(len(mlps), "MLP block"))]
    if mlps:
        columns: list[Column] = [("#", "right"), "module", "kind", "activation", "widths"]
        rows = [
            [
                str(m.index),
                m.fqn or "(the model)",
                _kind(m),
                m.activation.describe(),
                f"{m.input} > {m.hidden} > {m.output}",
            ]
            for m in mlps
        ]
        parts.append(table(columns, rows, fold=("module", "activation")))
    if misses:
        parts.append(heading(plural(len(misses), "near miss", "near misses") + " of MLP blocks"))
        parts.append(bullets(miss_lines(misses)))
    return parts


def _kind(mlp: MlpSite) -> str:
    words = mlp.kind.replace("_", " ")
    if mlp.experts:
        words = f"{mlp.experts} experts"
    if mlp.gate_layout in ("halves", "interleaved"):
        words += f", {mlp.gate_layout}"
    return f"{words}, dropout {mlp.dropout:g}" if mlp.dropout else words
