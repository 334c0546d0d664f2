"""The limits of this processor, measured: multiply-adds and bytes a second."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rewriter.backends.cpu.build import NoKernel, Unit, load
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import host_target

_CHAINS = 12  # independent multiply-adds in a round of the probe
_STREAM = 64 * 2**20  # floats: far larger than any cache


@dataclass(frozen=True)
class Limits:
    """Best of a few runs.

    Attributes:
        isa: instruction set of the generated code.
        gflops: float32 multiply-adds, two operations each, in 1e9 a second.
        pair_gflops: the same of bfloat16 with float32 sums, or None where the processor has no
            instruction for them.
        gbytes: bytes read from memory, in 1e9 a second.
    """

    isa: str
    gflops: float
    gbytes: float
    pair_gflops: float | None = None


def measure(threads: int = 1, runs: int = 5) -> Limits | NoKernel:
    """Measure with `threads` threads; takes about a second.

    One thread is timed by its own processor time, so that other work on the machine counts little.
    """
    target = host_target()
    if isinstance(target, str):
        return NoKernel(target)
    unit = load(Unit("probe", assemble(target, ["probe"], {}), target))
    if isinstance(unit, NoKernel):
        return unit
    unit.probe_fma.argtypes = [ctypes.c_long, ctypes.c_int]
    unit.probe_fma.restype = ctypes.c_float
    unit.probe_pairs.argtypes, unit.probe_pairs.restype = (
        [ctypes.c_long, ctypes.c_int],
        ctypes.c_int,
    )
    unit.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    unit.probe_read.restype = ctypes.c_float
    clock = time.process_time if threads == 1 else time.perf_counter

    def best(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(runs):
            began = clock()
            run()
            taken.append(clock() - began)
        return min(taken)

    rounds = 2_000_000
    operations = 2.0 * _CHAINS * target.lanes * rounds * threads
    data = torch.ones(_STREAM)
    fma = best(lambda: unit.probe_fma(rounds, threads))
    read = best(lambda: unit.probe_read(data.data_ptr(), _STREAM, threads))
    per_round = unit.probe_pairs(1, threads)
    pairs = None
    if per_round:
        taken = best(lambda: unit.probe_pairs(rounds // 4, threads))
        pairs = 2.0 * per_round * (rounds // 4) * threads / taken / 1e9
    return Limits(target.isa, operations / fma / 1e9, 4.0 * _STREAM / read / 1e9, pairs)
