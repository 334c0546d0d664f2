"""Time over length, one panel per kernel, with the crossover marked. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

from rewriter.atomic import write_file
from rewriter.bench.run import OURS, Table
from rewriter.errors import UnsupportedError


def draw(table: Table, path: Path) -> None:
    """Write the plot, in the format that the file name ends in.

    Raises:
        UnsupportedError: matplotlib is not installed.
        WriteError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a plot needs matplotlib: pip install 'attention-rewriter[bench]', or leave --plot out"
        ) from error
    cases = list(dict.fromkeys(p.case for p in table.points))
    columns = min(3, max(1, len(cases)))
    rows = -(-max(1, len(cases)) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels.flat, cases, strict=False):
        points = sorted((p for p in table.points if p.case == case), key=lambda p: p.length)
        names = list(dict.fromkeys(n for p in points for n in p.seconds))
        for name in names:
            xs = [p.length for p in points if name in p.seconds]
            ys = [p.seconds[name] * 1e3 for p in points if name in p.seconds]
            style = {"linewidth": 2.2} if name == OURS else {"linestyle": "--"}
            panel.plot(xs, ys, marker="o", markersize=3, label=name, **style)
        crossover = table.crossover(case)
        if crossover:
            panel.axvline(crossover, color="grey", linewidth=0.8)
            panel.annotate(f"{crossover:.0f}", (crossover, panel.get_ylim()[0]), fontsize=8)
        panel.set(xscale="log", yscale="log", title=points[0].title)
        panel.set_xlabel("tokens")
        panel.set_ylabel("ms per call")
        panel.legend(fontsize=7)
    what = "forward and backward" if table.options.train else "forward"
    figure.suptitle(f"{what}, {table.options.dtype}; {table.machine.describe()}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "svg")
    write_file(path, buffer.getvalue())
