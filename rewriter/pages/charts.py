"""Charts as inline SVG that follow the page: its width, and its light or dark colours.

Matplotlib draws with placeholder colours, which become CSS variables afterwards.
"""

from __future__ import annotations

import io
import re
from typing import Any

from rewriter.errors import UnsupportedError
from rewriter.pages.content import Chart, Line

_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0101", "#0a0102", "#0a0103", "#0a0104", "#0a0105", "#0a0106")
_STYLES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P")


def svg(chart: Chart) -> str:
    """The chart as an SVG element without size, coloured by the page's CSS variables.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a page with charts needs matplotlib: pip install 'attention-rewriter[bench]'"
        ) from error
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9}
    with mpl.rc_context({**settings, "text.parse_math": False}):
        figure = Figure(figsize=(6.0, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(chart.lines):
            _draw(axes, line, number)
        if chart.mark is not None:
            axes.axvline(chart.mark, color=_INK, linewidth=0.8, linestyle=":")
        if chart.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if chart.log_y:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, [y for line in chart.lines for _, y in line.points])
        axes.set_xlabel(chart.x, color=_INK)
        axes.set_ylabel(chart.y, color=_INK)
        axes.tick_params(colors=_INK, which="both")
        axes.grid(color=_GRID, linewidth=0.5)
        axes.set_facecolor("none")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        if len(chart.lines) > 1:
            axes.legend(labelcolor=_INK, framealpha=0.0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _adapted(buffer.getvalue(), chart)


def _plain_numbers(axis: Any, values: list[float]) -> None:
    """1, 2, 5, 10 ... as plain numbers; every digit where all values lie within a decade.

    Matplotlib's own labels of a logarithmic axis are formulas, which an SVG of plain text cannot
    hold.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    close = bool(values) and max(values) < 10 * min(values)
    axis.set_major_locator(LogLocator(subs=range(1, 10) if close else (1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw(axes: object, line: Line, number: int) -> None:
    colour = _SERIES[number % len(_SERIES)]
    xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
    style = _STYLES[number % len(_STYLES)] if line.joined else "none"
    axes.plot(  # type: ignore[attr-defined]
        xs,
        ys,
        color=colour,
        linestyle=style,
        marker=_MARKS[number % len(_MARKS)],
        markersize=4,
        label=line.name,
    )
    if line.spread:
        low, high = zip(*line.spread, strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)  # type: ignore[attr-defined]


def _adapted(text: str, chart: Chart) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    label = f"{chart.title}: {chart.y} over {chart.x}".replace('"', "'").replace("&", "and")
    label = label.replace("<", "").replace(">", "")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box[0]} role="img" aria-label="{label}"'
    )
    text = f"{head}>{rest}"
    for number, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--series-{number})")
    return text.replace(_INK, "var(--ink)").replace(_GRID, "var(--rule)").strip()
