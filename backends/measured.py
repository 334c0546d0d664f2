"""Decisions taken by measuring, once on a machine, and kept in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from rewriter.backends.cache import cache_directory


def remembered(
    kind: str, about: str, name: str, measure: Callable[[], Sequence[float]]
) -> tuple[float, ...]:
    """What `measure` gives, or gave earlier on this machine for the same code.

    Args:
        kind: names the file.
        about: what the times depend on beside the processor and torch: the text of generated code.
        name: of the decision.
    """
    digest = hashlib.sha256(f"{_machine()}\0{about}".encode()).hexdigest()
    file = cache_directory("measured") / f"{kind}-{digest[:16]}.json"
    if name not in (known := _read(file)):
        measured = list(measure())
        known = {**_read(file), name: measured}
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # then it is measured again in the next process
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(file)
    return tuple(known[name])


def _read(file: Path) -> dict[str, list[float]]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=1)
def _machine() -> str:
    """Processor and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = [x for x in lines if x.startswith(("model", "cpu family", "stepping"))]
    except OSError:
        cpu = [platform.processor()]
    return "\0".join([*cpu, torch.__version__])
