"""The table of kernel figures on this machine: docs/kernel_figures.md, .json and plots.

    python examples/kernel_table.py --out docs

Every row is timed against the stock ways in the same run (`rewriter bench`), batch 1, 8 heads of
64, causal unless said. On an idle machine it takes about twenty minutes with the compiled stock
forms (`--compiled`), eight without.

The bfloat16 rows are timed a second time in a process in which the library may not use tile
instructions (`CAPPED`), as on a processor that lacks them; ours keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rewriter.bench.plot import draw
from rewriter.bench.run import OURS, Options, Table, run
from rewriter.cli.show_bench import duration, point_line

FORWARD = ("dense", "window", "linear", "ssd", "gla", "gated_delta")
CAPPED = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
Measure = Callable[..., Table]
TWO = "## Two threads over one"
TRAINED = ("dense", "linear", "ssd", "gla", "gated_delta")


def rows(table: Table) -> list[str]:
    """Markdown rows of a table."""
    out = []
    for p in table.points:
        share = table.share_of_peak(p)
        others = ", ".join(f"{n} {duration(s)}" for n, s in p.seconds.items() if n != OURS)
        out.append(
            f"| {p.title} | {p.length:,} | {p.dtype} | {duration(p.seconds[OURS])} | {others} "
            f"| {p.ratio:.2f} x {p.best} | {'' if share is None else f'{share:.0%}'} "
            f"| {'' if p.peak_bytes is None else f'{p.peak_bytes / 2**20:.1f}'} | {p.backend} |"
        )
    return out


def section(title: str, tables: list[Table]) -> list[str]:
    head = ["", f"## {title}", ""]
    head += ["| kernel | tokens | dtype | ours | stock | ratio | of peak | peak MiB | by |"]
    head += ["|---|---|---|---|---|---|---|---|---|"]
    return head + [row for table in tables for row in rows(table)]


def scaling(one: Table, two: Table, what: str) -> list[str]:
    """How much faster two threads are than one."""
    slow = {(p.case, p.length): p.seconds[OURS] for p in one.points}
    fast = {(p.case, p.length): p for p in two.points}
    lines = []
    for key, seconds in slow.items():
        if key in fast:
            gain = seconds / fast[key].seconds[OURS]
            lines.append(f"| {fast[key].title} | {key[1]:,} | {what} | {gain:.2f} x |")
    return lines


def halves(measure: Measure, lengths: tuple[int, ...]) -> list[Table]:
    """The bfloat16 rows: dense attention at every length, the others at two."""
    half = {"dtype": "bfloat16"}
    return [
        measure(only=("dense",), lengths=lengths, **half),
        measure(only=("window",), lengths=(4096, 8192), **half),
        measure(only=FORWARD[2:], lengths=(4096, 8192), **half),
        measure(only=("cache_step",), lengths=(4096, 32768), **half),
    ]


def both_cores(measure: Measure) -> list[Table]:
    """One thread and two with eight heads, then with one; nothing else may run meanwhile."""
    plain = {"lengths": (4096,), "compiled": False, "only": FORWARD}
    single = {**plain, "only": ("linear", "ssd", "dense"), "heads": 1, "kv_heads": 1}
    return [measure(**given, threads=n) for given in (plain, single) for n in (1, 2)]


def gains(tables: list[Table]) -> str:
    """The section of `both_cores`."""
    one, two, lone, pair = tables
    text = [TWO, "", "| kernel | tokens | heads | gain |", "|---|---|---|---|"]
    return "\n".join([*text, *scaling(one, two, "8"), *scaling(lone, pair, "1")])


def renew_both_cores(out: Path, tables: list[Table]) -> None:
    """Replace that section, and its figures, in what an earlier run has written."""
    page, data = out / "kernel_figures.md", out / "kernel_figures.json"
    text = page.read_text()
    rest = text.split(TWO)[1].partition("\n\nLeft out")
    page.write_text(text.split(TWO)[0] + gains(tables) + "".join(rest[1:]).rstrip() + "\n")
    figures = json.loads(data.read_text())
    figures[-8:-4] = [json.loads(t.to_json()) for t in tables]  # before those of `halves`
    data.write_text(json.dumps(figures, indent=1) + "\n")


def without_tiles(options: argparse.Namespace) -> dict[str, list[str]]:
    """The markdown rows of `halves` and their figures, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "rows.json"
        changed = ["--seconds", str(options.seconds), "--lengths", options.lengths]
        changed += ["--compiled"] if options.compiled else []
        command = [sys.executable, __file__, "--capped-rows", str(to), *changed]
        subprocess.run(command, env={**os.environ, **CAPPED}, check=True)
        found: dict[str, list[str]] = json.loads(to.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compiled", action="store_true", help="time torch.compile's forms too")
    parser.add_argument("--both-cores", action="store_true", help="only measure these rows again")
    parser.add_argument("--capped-rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = tuple(int(n) for n in options.lengths.split(","))
    console = Console()

    def measure(**changes: object) -> Table:
        base = Options(seconds=options.seconds, compiled=options.compiled)
        wanted = replace(base, **changes)  # type: ignore[arg-type]
        return run(wanted, lambda point: console.print(point_line(point), markup=False))

    if options.capped_rows is not None:
        tables = halves(measure, lengths)
        out = {"rows": [row for t in tables for row in rows(t)]}
        out["tables"] = [t.to_json() for t in tables]
        options.capped_rows.write_text(json.dumps(out))
        return
    if options.both_cores:
        renew_both_cores(options.out, both_cores(measure))
        return

    forward = measure(only=FORWARD, lengths=tuple(n for n in lengths if n <= 8192))
    longest = measure(only=("dense",), lengths=tuple(n for n in lengths if n > 8192))
    half = halves(measure, lengths)
    capped = without_tiles(options)
    train = measure(only=TRAINED, lengths=(4096,), train=True, compiled=False)
    slopes = {"dtype": "bfloat16", "train": True, "compiled": False}
    train_half = measure(only=("dense",), lengths=(1024, 2048, 4096), **slopes)
    steps = measure(only=("cache_step",), lengths=(4096, 32768))
    recurrent = measure(only=("recurrent_step",), lengths=(1,))
    tiny = measure(only=("recurrent_step",), lengths=(1,), heads=1, kv_heads=1, width=16)
    cores = both_cores(measure)

    limits = forward.limits
    text = ["# Kernel figures", "", f"Machine: {forward.machine.describe()}."]
    if limits is not None:
        text += [
            f"Measured limits of one thread ({limits.isa}): {limits.gflops:.1f} GFLOP/s of float32 "
            f"multiply-adds, {limits.gbytes:.1f} GB/s read."
        ]
        if limits.pair_gflops is not None:
            text += [f"bfloat16 multiply-adds: {limits.pair_gflops:.0f} GFLOP/s."]
    text += ["", "Made by `examples/kernel_table.py`; medians, all contenders of a row in one run."]
    text += ["`ratio` is the fastest named stock way over ours. One thread unless said."]
    text += section("Forward", [forward, longest, *half[:3]])
    text += section("Forward and backward", [train, train_half])
    text += section("One token", [steps, half[3], recurrent])
    call = tiny.points[0].seconds[OURS]
    text += [
        "",
        f"A recurrent step of one head of 16, nearly all of it the call: {duration(call)}.",
    ]
    text += section("bfloat16, the library without tile instructions", [])
    text += capped["rows"]
    text += ["", f"With {', '.join(f'`{k}={v}`' for k, v in CAPPED.items())}; ours unchanged."]
    text += ["", gains(cores)]
    left = {(c, why) for t in (forward, *half, train, train_half) for c, _, why in t.failed}
    text += ["", *(f"Left out, {case}: {why}" for case, why in sorted(left))]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel_figures.md").write_text("\n".join(text).rstrip() + "\n")
    every = (forward, longest, *half, train, train_half, steps, recurrent, tiny, *cores)
    figures = [json.loads(t) for t in (*(t.to_json() for t in every), *capped["tables"])]
    (options.out / "kernel_figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(forward, options.out / "kernel_figures.svg")


if __name__ == "__main__":
    main()
