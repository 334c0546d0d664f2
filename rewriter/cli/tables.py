"""Tables that look right at 80 columns and in a pipe, and how single values are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Align = Literal["left", "right"]
Column = str | tuple[str, Align]
_OUTCOME_STYLES = {
    "pass": "green",
    "done": "green",
    "fail": "bold red",
    "refused": "yellow",
    "reported": "cyan",
}


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    fold: Sequence[str] = (),
) -> Table:
    """A table without edges; nothing in it is ever cut off.

    Args:
        columns: headers, right-aligned where written as (header, 'right').
        rows: cells as plain text (no markup is read from them).
        fold: headers of columns that give way first where the line is too narrow.
    """
    out = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for column in columns:
        header, justify = (column, "left") if isinstance(column, str) else column
        wraps = header in fold
        out.add_column(
            header,
            justify="right" if justify == "right" else "left",
            overflow="fold",
            no_wrap=not wraps and bool(fold),
        )
    for row in rows:
        out.add_row(*(styled(cell) for cell in row))
    return out


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Name and value pairs; long values wrap under themselves."""
    out = Table.grid(padding=(0, 2))
    out.add_column(no_wrap=True, style="bold")
    out.add_column(overflow="fold")
    for name, value in rows:
        out.add_row(Text(name), Text(value))
    return out


def heading(text: str) -> Padding:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def bullets(lines: Iterable[tuple[str, str]]) -> Table:
    """A list: a short label and text that wraps beside it."""
    out = Table.grid(padding=(0, 1))
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for label, text in lines:
        out.add_row(Text(f"  {label}"), Text(text))
    return out


def styled(cell: str) -> Text:
    return Text(cell, style=_OUTCOME_STYLES.get(cell, ""))


def number(value: float | None) -> str:
    """Three significant digits, integers as they are."""
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def size(count: float) -> str:
    """Bytes as '512 B', '1.5 KiB', '20 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def plural(count: int, noun: str, several: str | None = None) -> str:
    """'1 site', '30 sites', '0 near misses'."""
    return f"{count} {noun}" if count == 1 else f"{count} {several or noun + 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], n)
        else:
            parts.append((n, n))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def place(file: str | None, line: int | None) -> str:
    """'package/module.py:12': a path as far as a person needs it."""
    if file is None:
        return "unknown line"
    path = Path(file)
    parts = path.parts
    if "site-packages" in parts:
        shown = "/".join(parts[parts.index("site-packages") + 1 :])
    elif path.is_relative_to(Path.cwd()):
        shown = path.relative_to(Path.cwd()).as_posix()
    else:
        shown = "/".join(parts[-3:])
    return shown if line is None else f"{shown}:{line}"
