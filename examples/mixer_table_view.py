"""The results of `mixer_table.py` as a page and a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from rewriter.cli.tables import size

Row = Mapping[str, Any]
ORIGINAL = "original"
NEAR, FAR = "2048", "8192"


CHANNEL = [
    "",
    "## Channel mixers",
    "",
    "The MLP blocks of the same 22 layers with default options, fitted to 2,048 tokens of text,",
    "with the same training. Saved: of the whole model, fp32. Prefill and token: of one block.",
    "",
    "| mixer | tier | parameters saved | gap, fitted | trained | perplexity | copy | "
    "prefill 2k, 8k | token |",
    "|---|---|---|---|---|---|---|---|---|",
]


def markdown(done: Mapping[str, Any]) -> str:
    """The page."""
    rows: Mapping[str, Row] = done["rows"]
    first = rows[ORIGINAL]
    mixers = {n: r for n, r in rows.items() if "parameters" not in r}
    blocks = {n: r for n, r in rows.items() if "parameters" in r}
    lines = [
        "# The mixers on a real model",
        "",
        "SmolLM2-135M-Instruct, 22 of 30 layers rewritten with default options, 8 kept. Mixers",
        f"with parameters start from data and get {done['steps']} steps of layer-wise training, a",
        "row of 512 tokens each; the others are used as they are. Quality in bfloat16. Made by",
        "`examples/mixer_table.py`; `--only-times` measures the times alone.",
        "",
        f"Machine: {done['machine']}.",
        "",
        "![the table as a plot](mixers.svg)",
        "",
        "Start: with neutral parameters; fitted: after the start from 2,048 tokens of data.",
        "Gap: |block - original| / |original| of the attention blocks' outputs, which is what",
        "trains, on held-out text, mean of the 22 layers. Perplexity: on the second half of three",
        f"rows of 1,024 held-out tokens, over the original's {first['perplexity']:.2f}.",
        "Copy: perplexity of a passage that stood 700 tokens before. `duo` and `razor` keep the",
        "heads that `rewriter.planner.head_scores` finds. State, prefill and token: of one layer's",
        "core (of the original: torch's attention and the cache), fp32, one thread; for `duo` and",
        "`razor` a layer that keeps no whole head, so layers that keep some cost more. The gap of",
        "`moba` is 0 because its rows of 512 tokens are as long as the blocks that it chooses.",
        "",
        "| mixer | tier | gap, start | fitted | trained | perplexity | copy | "
        "state at 2k, 8k | prefill 2k, 8k | token at 2k, 8k |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_mixer_line(n, r, first) for n, r in _sorted(mixers)]
    lines += [
        "",
        "That is little training: it says how near a mixer starts and how fast it learns, not how",
        "good it can become.",
    ]
    learned = [n for n, r in rows.items() if r.get("tier") == "distilled"]
    blank = [f"`{n}`" for n in learned if "gap_distilled" not in rows[n]]
    if blank:
        lines += ["", f"The trained gap was not measured yet of {', '.join(blank)}."]
    if done["missing"]:
        names = ", ".join(f"`{name}`" for name in done["missing"])
        lines += ["", f"Not measured yet: {names}. Running the script again adds them."]
    if blocks:
        lines += [*CHANNEL, _block_line(ORIGINAL, {**first, **first["block"]}, first)]
    lines += [_block_line(n, r, first) for n, r in _sorted(blocks)]
    return "\n".join(lines) + "\n"


def _block_line(name: str, row: Row, first: Row) -> str:
    near, far = row["speed"][NEAR], row["speed"][FAR]
    saved = ""
    if "saved" in row:
        share = row["saved"] / (row["saved"] + row["parameters"])
        saved = f"{row['saved'] / 1e6:.1f} M ({share:.0%}), {size(4 * row['saved'])}"
    return (
        f"| {_shown(name)} | {row.get('tier', '')} | {saved} | {_given(row, 'gap_fitted')} "
        f"| {_given(row, 'gap_distilled')} | {_quality(row, first)} "
        f"| {near['prefill'] * 1e3:.0f} ms, {far['prefill'] * 1e3:.0f} ms "
        f"| {near['token'] * 1e3:.2f} ms |"
    )


def _gaps(row: Row) -> list[float]:
    """At the start, fitted, trained; nan where it was not measured."""
    gaps: list[float] = [row.get(f"gap_{w}", math.nan) for w in ("start", "fitted", "distilled")]
    return [g for g in gaps if not math.isnan(g)] or [math.nan]


def _shown(name: str) -> str:
    return "original" if name == ORIGINAL else f"`{name}`"


def _given(row: Row, gap: str) -> str:
    return f"{row[gap]:.3f}" if gap in row else ""


def _quality(row: Row, first: Row) -> str:
    return f"{row['perplexity'] / first['perplexity']:.2f} x | {row['copy_perplexity']:.2f}"


def _mixer_line(name: str, row: Row, first: Row) -> str:
    near, far = row["speed"][NEAR], row["speed"][FAR]
    return (
        f"| {_shown(name)} | {row.get('tier', '')} | {_given(row, 'gap_start')} "
        f"| {_given(row, 'gap_fitted')} | {_given(row, 'gap_distilled')} "
        f"| {_quality(row, first)} "
        f"| {size(near['state'])}, {size(far['state'])} "
        f"| {near['prefill'] * 1e3:.0f} ms, {far['prefill'] * 1e3:.0f} ms "
        f"| {near['token'] * 1e3:.2f} ms, {far['token'] * 1e3:.2f} ms |"
    )


def _sorted(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """By perplexity, the original first."""
    return sorted(rows.items(), key=lambda item: (item[0] != ORIGINAL, item[1]["perplexity"]))


def plot(done: Mapping[str, Any]) -> bytes:
    """Bars of every mixer, the original as a line. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [(n, r) for n, r in _sorted(done["rows"]) if "parameters" not in r]
    first, rows = rows[0][1], rows[1:]
    names = [n for n, _ in rows]
    panels: dict[str, Callable[[Row], float]] = {
        "gap to the original": lambda r: min(_gaps(r)),
        "perplexity": lambda r: r["perplexity"],
        "copy perplexity": lambda r: r["copy_perplexity"],
        "state at 8k, MiB": lambda r: r["speed"][FAR]["state"] / 2**20,
        "ms a token at 8k": lambda r: r["speed"][FAR]["token"] * 1e3,
    }
    figure = Figure(figsize=(13, 0.32 * len(names) + 1.4), layout="constrained")
    for axis, (title, value) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        axis.barh(names, [value(r) for _, r in rows], height=0.6, color="#4477aa")
        if "gap" in title:
            starts = [min(_gaps(r)[:2]) for _, r in rows]
            axis.plot(starts, names, "|", color="#cc6677", markersize=9, label="start")
            axis.legend(fontsize=7)
        else:
            axis.axvline(value(first), color="black", linewidth=1)
        if title.startswith(("copy", "perplexity")):
            axis.set_xscale("log")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.axes[0].invert_yaxis()
    figure.suptitle("22 of 30 layers of SmolLM2-135M; black: the original", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
