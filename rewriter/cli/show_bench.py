"""How timings look in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from rewriter.bench.run import OURS, Point, Table
from rewriter.cli.tables import Column, table


def bench_view(measured: Table) -> Iterator[RenderableType]:
    """The machine, one line per point, the crossovers and what was left out."""
    yield Text(measured.machine.describe())
    if measured.limits is not None:
        limits = measured.limits
        pairs = limits.pair_gflops
        half = "" if pairs is None else f", {pairs:.0f} of bfloat16"
        yield Text(
            f"measured limits ({limits.isa}): {limits.gflops:.1f} GFLOP/s of multiply-adds{half}, "
            f"{limits.gbytes:.1f} GB/s read"
        )
    rows = [_row(p, measured.share_of_peak(p)) for p in measured.points]
    columns: tuple[Column, ...] = (
        "kernel",
        ("tokens", "right"),
        ("ours", "right"),
        "best stock",
        ("its time", "right"),
        ("ratio", "right"),
        ("of peak", "right"),
        ("peak", "right"),
    )
    yield table(columns, rows)
    for case in dict.fromkeys(p.case for p in measured.points):
        crossover = measured.crossover(case)
        if crossover is None:
            yield Text(f"{case}: slower than the best stock way at the longest length measured")
        elif crossover > 0:
            yield Text(f"{case}: faster from about {crossover:.0f} tokens")
    for backend in dict.fromkeys(p.backend for p in measured.points):
        cases = dict.fromkeys(p.case for p in measured.points if p.backend == backend)
        yield Text(f"run by backend '{backend}': {', '.join(cases)}")
    reasons = {(p.case, name, why) for p in measured.points for name, why in p.declined}
    for case, name, why in sorted(reasons):
        yield Text(f"{case}: not on backend '{name}': {why}")
    for case, length, why in measured.failed:
        yield Text(f"{case} at {length}: left out {why}")


def point_line(point: Point) -> str:
    """One line of progress."""
    times = ", ".join(f"{name} {duration(s)}" for name, s in point.seconds.items())
    return f"{point.case} {point.length}: {times}"


def duration(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def _row(p: Point, share: float | None) -> tuple[str, ...]:
    return (
        p.case,
        str(p.length),
        duration(p.seconds[OURS]),
        p.best if p.best != OURS else "none",
        duration(p.seconds[p.best]),
        f"{p.ratio:.2f}x",
        f"{share:.0%}" if share is not None else "",
        f"{p.peak_bytes / 2**20:.1f} MiB" if p.peak_bytes is not None else "",
    )
