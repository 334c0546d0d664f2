"""Measured peak memory of a call: the rise of the process's resident set, reset before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set rose at most during `run()`; None where it cannot be read.

    A call before it has to warm caches up. Free memory that the allocator keeps from earlier calls
    is given back first, so that it is counted again when it is used; where that cannot be done the
    figure is a lower bound.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
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
