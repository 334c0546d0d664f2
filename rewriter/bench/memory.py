"""Measured peak memory of a call: the rise of the process's resident set, reset before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set rose at most during `run()`; None where it cannot be read.

    A call before it has to warm caches up. Memory that the allocator kept from earlier calls is
    not counted, so the figure is a lower bound; the first call in a process is the honest one.
    """
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    before = _field("VmRSS")
    run()
    peak = _field("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
