"""Interleaved timing: every round calls each contender once, so a busy moment hits them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Clock = Literal["wall", "cpu"]
_CLOCKS: Mapping[Clock, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}
_SHORT = 2e-4  # seconds; shorter calls are repeated inside a sample, so the clock resolves them


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and least of `samples` samples."""

    median: float
    least: float
    samples: int


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (3, 50),
    clock: Clock = "wall",
    warmed: bool = False,
) -> dict[str, Timing]:
    """Time all contenders in rounds.

    Args:
        contenders: functions without arguments by name.
        seconds: spent on all rounds together, at least the least number of rounds.
        rounds: least and most rounds.
        clock: 'wall', or 'cpu' for the processor time of this process: the choice on a shared
            machine, one thread only.
        warmed: all have run before and take long: no call goes before the first round.
    """
    read = _CLOCKS[clock]
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        if warmed:
            repeats[name] = 1
            continue
        run()
        began = time.perf_counter()
        run()
        once = time.perf_counter() - began
        repeats[name] = 1 if once > _SHORT else max(1, int(10 * _SHORT / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    least, most = rounds
    began = time.perf_counter()
    for number in range(most):
        for name, run in contenders.items():
            times = range(repeats[name])
            start = read()
            for _ in times:
                run()
            samples[name].append((read() - start) / repeats[name])
        if number + 1 >= least and time.perf_counter() - began > seconds:
            break
    return {
        name: Timing(statistics.median(taken), min(taken), len(taken))
        for name, taken in samples.items()
    }
