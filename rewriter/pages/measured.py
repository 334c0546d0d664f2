"""Sections about measurements: quality, a search, kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.pages.content import Cell, Chart, Facts, Grid, Item, Line, Section, Words, number
from rewriter.pages.lengths import by_length


def quality(result: Mapping[str, Any]) -> Sequence[Section]:
    """Sections of the JSON that `rewriter eval --json` writes."""
    models = result["models"]
    metrics = _union(models)
    rows = []
    for metric in metrics:
        found = [row[metric] for row in models.values() if metric in row]
        cells = [_interval(models[name].get(metric)) for name in models]
        samples = Cell(f"{found[0]['samples']} ({found[0]['tokens']} tokens)", "quiet")
        rows.append((Cell(metric), Cell(found[0]["better"]), samples, *cells))
    head = ("metric", "good", "samples", *models)
    items: list[Item] = [
        Words("Each figure with its 95 % interval, and its ratio to the original in pairs."),
        Grid(head, tuple(rows), frozenset(range(3, len(head)))),
    ]
    position = _by_position(models)
    if position is not None:
        items.append(position)
    items += by_length(models)
    items += [Words(note) for note in result.get("notes", [])]
    out = [Section("Quality", tuple(items))]
    ablation = result.get("ablation") or {}
    if ablation.get("without"):
        out.append(_ablation(ablation))
    return out


def _interval(measured: Mapping[str, Any] | None) -> Cell:
    if measured is None:
        return Cell("-", "quiet")
    text = number(measured["value"])
    if measured.get("interval") != "none":
        text += f" ({number(measured['low'])} to {number(measured['high'])})"
    over = measured.get("over_teacher")
    if over is not None:
        text += f", {over['value']:.3f} x"
    return Cell(text)


def _by_position(models: Mapping[str, Any]) -> Chart | None:
    """Perplexity over the position in the row, where it was measured in parts."""
    lines = []
    for name, row in models.items():
        parts = (row.get("perplexity") or {}).get("parts") or {}
        points = []
        for label, value in parts.items():
            found = re.fullmatch(r"tokens (\d+)-(\d+)", label)
            if found and isinstance(value, int | float):
                points.append(((int(found[1]) + int(found[2])) / 2, float(value)))
        if len(points) > 1:
            lines.append(Line(name, tuple(sorted(points))))
    if not lines:
        return None
    return Chart("Perplexity by position", "position in the text (tokens)", "perplexity", (*lines,))


def _ablation(ablation: Mapping[str, Any]) -> Section:
    without = ablation["without"]
    metrics = _union(without)
    rows = [
        (Cell(branch), *(_interval(row.get(metric)) for metric in metrics))
        for branch, row in without.items()
    ]
    note = Words(
        f"'{ablation.get('model', '')}' with one branch of its mixers switched off everywhere: "
        "a branch whose absence changes nothing is not used."
    )
    grid = Grid(("switched off", *metrics), tuple(rows), frozenset(range(1, len(metrics) + 1)))
    return Section("What each branch is worth", (note, grid))


def searched(result: Mapping[str, Any]) -> Sequence[Section]:
    """Sections of what a search wrote: every measured assignment, the front, the choice."""
    assignments = result["assignments"]
    points = sorted({(float(a["cost"]), float(a["copy_perplexity"])) for a in assignments})
    front: list[tuple[float, float]] = []
    for cost, value in points:
        if not front or value < front[-1][1]:
            front.append((cost, value))
    items: list[Item] = [
        Facts(
            (
                ("budget", f"{number(result['budget'])} {result.get('unit', '')}".strip()),
                ("assignments measured", str(len(assignments))),
                ("perplexity of the choice", number(result["best"]["perplexity"])),
                ("copy perplexity of the choice", number(result["best"]["copy_perplexity"])),
            )
        ),
        Words(
            "Measured on the probes of the search, which flatter its choice; the quality tables "
            "use other text."
        ),
    ]
    if len({cost for cost, _ in points}) > 1:
        lines = (
            Line("measured", tuple(points), joined=False),
            Line("best for its cost", tuple(front)),
        )
        unit = result.get("unit") or "cost"
        items.append(Chart("Quality against cost", unit, "copy perplexity", lines, log_y=True))
    else:
        order = tuple((float(n), float(a["copy_perplexity"])) for n, a in enumerate(assignments))
        line = Line("measured, best first", order, joined=False)
        items.append(Chart("Assignments", "rank", "copy perplexity", (line,), log_y=True))
    return [Section("The search", tuple(items))]


def kernels(result: Mapping[str, Any]) -> Sequence[Section]:
    """Sections of the JSON that `rewriter bench --out` writes."""
    by_case: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        by_case.setdefault(point["case"], []).append(point)
    items: list[Item] = [Words(_machine(result))]
    rows = []
    for points in by_case.values():
        points.sort(key=lambda p: p["length"])
        for p in points:
            rows.append(
                (
                    Cell(p["title"]),
                    Cell(str(p["length"])),
                    Cell(_duration(p["seconds"]["ours"])),
                    Cell(p["best"] or "-"),
                    Cell(f"{p['ratio']:.2f} x" if p.get("ratio") else "-", _tone(p.get("ratio"))),
                )
            )
    head = ("kernel", "tokens", "ours", "best other way", "gain")
    items.append(Grid(head, tuple(rows), frozenset({1, 2, 4})))
    for points in by_case.values():
        if len(points) > 1:
            items.append(_times(points))
    return [Section("Kernels on this machine", tuple(items))]


def _duration(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _tone(ratio: float | None) -> Any:
    return "plain" if ratio is None else "good" if ratio >= 1 else "bad"


def _times(points: Sequence[Mapping[str, Any]]) -> Chart:
    names = list(dict.fromkeys(name for p in points for name in p["seconds"]))
    lines = tuple(
        Line(
            name,
            tuple((p["length"], p["seconds"][name] * 1e3) for p in points if name in p["seconds"]),
        )
        for name in names
    )
    return Chart(points[0]["title"], "tokens", "ms a call", lines, log_x=True, log_y=True)


def _machine(result: Mapping[str, Any]) -> str:
    machine, options = result.get("machine", {}), result.get("options", {})
    what = "forward and backward" if options.get("train") else "forward"
    return (
        f"{machine.get('processor', 'unknown processor')} "
        f"({' '.join(machine.get('extensions', []))}), {machine.get('threads', '?')} threads, "
        f"torch {machine.get('torch', '?')}; {what}, {options.get('dtype', '')}; medians of "
        "interleaved rounds."
    )


def _union(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows.values() for metric in row))
