"""Run cases over lengths and keep every figure with the machine it was taken on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from rewriter.backends.cpu.build import NoKernel
from rewriter.backends.cpu.probe import Limits, measure
from rewriter.bench.cases import CASES, Case, Setting
from rewriter.bench.machine import Machine, this_machine
from rewriter.bench.memory import peak_bytes
from rewriter.errors import UsageError
from rewriter.timing import Clock, interleaved

OURS = "ours"


@dataclass(frozen=True)
class Point:
    """One measured point.

    Attributes:
        case, title, length, dtype, train: what was timed.
        backend: who ran ours; 'reference' means that no generated kernel served.
        declined: why faster backends did not serve.
        seconds: median per contender.
        best: the fastest stock contender among the case's `against`.
        ratio: its time over ours; above 1 ours is faster.
        gflops: arithmetic of ours per second, 0 where it is not counted.
        peak_bytes: measured rise of the resident set in one call of ours, or None.
    """

    case: str
    title: str
    length: int
    dtype: str
    train: bool
    backend: str
    declined: tuple[tuple[str, str], ...]
    seconds: dict[str, float]
    best: str
    ratio: float
    gflops: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        only: case names; empty means all.
        lengths: tokens, or context of a decode step.
        dtype: of the values.
        train: forward and backward.
        threads: torch threads.
        seconds: spent on each point, at least three rounds.
        clock: 'wall' or 'cpu'.
        compiled: also time the forms that `torch.compile` makes; each costs seconds to compile.
        heads, kv_heads, width: shapes; decode steps take 9 and 3 heads where these are 8 and 8.
    """

    only: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    dtype: str = "float32"
    train: bool = False
    threads: int = 1
    seconds: float = 2.0
    clock: Clock = "wall"
    compiled: bool = True
    heads: int = 8
    kv_heads: int = 8
    width: int = 64


@dataclass(frozen=True)
class Table:
    """All points and the machine.

    Attributes:
        limits: measured multiply-add and memory speed with these threads, None without a compiler.
        failed: (case, length, reason) of contenders left out.
    """

    machine: Machine
    options: Options
    points: tuple[Point, ...]
    limits: Limits | None = None
    failed: tuple[tuple[str, int, str], ...] = field(default=())

    def share_of_peak(self, point: Point) -> float | None:
        """Arithmetic of ours over the measured peak for its dtype, where both are known."""
        if self.limits is None or not point.gflops:
            return None
        peaks = {"float32": self.limits.gflops, "bfloat16": self.limits.pair_gflops}
        peak = peaks.get(point.dtype)
        return None if peak is None else point.gflops / peak

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def crossover(self, case: str) -> float | None:
        """Length from which ours is faster than the best stock way, interpolated in log length.

        0 if it is faster at every measured length, None if at none or not at the longest.
        """
        points = sorted((p.length, p.ratio) for p in self.points if p.case == case)
        slower = [n for n, ratio in points if ratio < 1]
        if not slower:
            return 0.0 if points else None
        below = max(slower)
        above = [n for n, _ in points if n > below]
        if not above:
            return None
        ratio = dict(points)
        low, high = ratio[below], ratio[min(above)]
        part = (1 - low) / (high - low)
        return float(below * (min(above) / below) ** part)


def chosen(only: Sequence[str]) -> tuple[Case, ...]:
    """Cases by name.

    Raises:
        UsageError: an unknown name.
    """
    known = {case.name: case for case in CASES}
    for name in only:
        if name not in known:
            raise UsageError(f"unknown kernel '{name}'; choose from {', '.join(known)}")
    return tuple(known[n] for n in only) if only else CASES


def run(options: Options, report: Callable[[Point], None] | None = None) -> Table:
    """Measure every case at every length; sets torch's thread count while it runs."""
    cases = chosen(options.only)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    points: list[Point] = []
    failed: list[tuple[str, int, str]] = []
    try:
        for case in cases:
            if options.train and not case.trains:
                continue
            for length in options.lengths:
                for item in _point(case, length, options):
                    if isinstance(item, Point):
                        points.append(item)
                        if report is not None:
                            report(item)
                    else:
                        failed.append((case.name, length, item))
        limits = measure(options.threads)
        known = None if isinstance(limits, NoKernel) else limits
        return Table(this_machine(), options, tuple(points), known, tuple(failed))
    finally:
        torch.set_num_threads(before)


def _point(case: Case, length: int, options: Options) -> Iterator[Point | str]:
    setting = Setting(
        length,
        options.heads,
        options.kv_heads,
        options.width,
        getattr(torch, options.dtype),
        options.train,
    )
    if case.decodes and case.name == "cache_step" and options.heads == options.kv_heads == 8:
        setting = replace(setting, heads=9, kv_heads=3)
    torch.manual_seed(length)
    prepared = case.prepare(setting, options.compiled)
    contenders = dict(prepared.contenders)
    contenders[OURS]()
    memory = peak_bytes(contenders[OURS])
    for name in list(contenders):
        if name == OURS:
            continue
        try:
            contenders[name]()
        except Exception as error:  # a stock contender may not serve a setting at all
            del contenders[name]
            yield f"{name}: {type(error).__name__}: {_first_line(error)}"
    timings = interleaved(contenders, seconds=options.seconds, clock=options.clock)
    seconds = {name: timing.median for name, timing in timings.items()}
    stock = {n: seconds[n] for n in case.against if n in seconds}
    best = min(stock, key=lambda n: stock[n]) if stock else OURS
    yield Point(
        case=case.name,
        title=case.title,
        length=length,
        dtype=options.dtype,
        train=options.train,
        backend=prepared.backend,
        declined=prepared.declined,
        seconds=seconds,
        best=best,
        ratio=seconds[best] / seconds[OURS],
        gflops=prepared.flops / seconds[OURS] / 1e9 if not options.train else 0.0,
        peak_bytes=memory,
    )


def _first_line(error: Any) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else ""
