"""The machine a timing was taken on, so that a figure never travels without it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_WANTED = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "neon", "sve")


@dataclass(frozen=True)
class Machine:
    """Attributes: processor name, the vector extensions it has, cores, threads used, versions."""

    processor: str
    extensions: tuple[str, ...]
    cores: int
    threads: int
    torch: str

    def describe(self) -> str:
        extensions = " ".join(self.extensions) or "no vector extensions known"
        return (
            f"{self.processor} ({extensions}), {self.cores} cores, {self.threads} thread"
            f"{'s' if self.threads > 1 else ''} used, torch {self.torch}"
        )


def this_machine() -> Machine:
    facts = _cpuinfo()
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    family = facts.get("cpu family")
    if family is not None:
        name = f"{name} family {family} model {facts.get('model', '?')}"
    return Machine(
        processor=name,
        extensions=tuple(f for f in _WANTED if f in flags),
        cores=len(_affinity()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _affinity() -> set[int]:
    import os

    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set(range(os.cpu_count() or 1))
