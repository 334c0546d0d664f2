"""What code is generated for: vector width and instructions of the processor, found at run time."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from rewriter.backends.cpu.compiler import NoKernel, find_compiler, knows

VARIABLE = "ATTENTION_REWRITER_ISA"


@dataclass(frozen=True)
class Target:
    """An instruction set that units are compiled for.

    Attributes:
        isa: its name.
        lanes: floats in a vector.
        flags: what the compiler is told.
        bf16_dot: bf16 operands are packed in pairs for a two-term dot product. Without the
            instruction (in tests) the same packing runs on an emulation with the same rounding.
        tiles: bf16 operands are multiplied in tiles of 16 x 32 (AMX); emulated likewise.
    """

    isa: str
    lanes: int
    flags: tuple[str, ...]
    bf16_dot: bool = False
    tiles: bool = False


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (
    *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"),
    "-mprefer-vector-width=512",
)

TARGETS: dict[str, Target] = {
    t.isa: t
    for t in (
        Target(
            "amx_bf16",
            16,
            (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
            bf16_dot=True,
            tiles=True,
        ),
        Target("avx512_bf16", 16, (*_AVX512, "-mavx512bf16"), bf16_dot=True),
        Target("avx512", 16, _AVX512),
        Target("avx2", 8, _AVX2),
        Target("portable", 4, ()),
        # The sources of the widest targets on a narrower machine: for tests, never chosen.
        Target("wide_on_avx2", 16, _AVX2, bf16_dot=True),
        Target("tiles_on_avx2", 16, _AVX2, bf16_dot=True, tiles=True),
    )
}

# Flags of /proc/cpuinfo that a target needs, the best target first.
_WIDE = frozenset(("avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"))
_NEEDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx_bf16", _WIDE | {"avx512_bf16", "amx_tile", "amx_bf16"}),
    ("avx512_bf16", _WIDE | {"avx512_bf16"}),
    ("avx512", _WIDE),
    ("avx2", frozenset(("avx2", "fma"))),
)
# An instruction of each that the assembler has to know too.
_TELLING = {
    "amx_bf16": "tdpbf16ps %tmm0, %tmm1, %tmm2",
    "avx512_bf16": "vdpbf16ps %zmm0, %zmm1, %zmm2",
    "avx512": "vaddps %zmm0, %zmm1, %zmm2",
    "avx2": "vpaddd %ymm0, %ymm1, %ymm2",
}
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: ARCH_REQ_XCOMP_PERM


def host_target() -> Target | str:
    """The best target of processor and compiler, or the one $ATTENTION_REWRITER_ISA names.

    A name that is not known gives the reason as a string.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return _detected(os.environ.get("CXX"), os.environ.get("PATH"))
    if wanted not in TARGETS:
        return f"${VARIABLE} names {wanted!r}, which is none of {', '.join(TARGETS)}"
    if wanted == "amx_bf16" and not _tiles_permitted():
        return f"${VARIABLE} names amx_bf16, but the system does not lend its tile registers"
    return TARGETS[wanted]


@lru_cache(maxsize=8)
def _detected(cxx: str | None, path: str | None) -> Target:
    """The best target of the processor that the compiler knows; the one below it otherwise."""
    flags, compiler = cpu_flags(), find_compiler(cxx)
    for isa, needs in _NEEDS:
        target = TARGETS[isa]
        if not needs <= flags or (target.tiles and not _tiles_permitted()):
            continue
        if isinstance(compiler, NoKernel) or knows(compiler, target.flags, _TELLING[isa]):
            return target
        warnings.warn(
            f"{compiler.command[0]} does not know the instructions {isa} of this processor. "
            "Slower kernels are used.",
            RuntimeWarning,
            stacklevel=2,
        )
    return TARGETS["portable"]


@lru_cache(maxsize=1)
def _tiles_permitted() -> bool:
    """Ask Linux for the tile registers; a process has to, once, and may be refused."""
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of this processor, in the kernel's names."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return frozenset()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    level = torch.backends.cpu.get_cpu_capability()  # where there is no such file
    names = {"AVX512": _WIDE | _NEEDS[-1][1], "AVX2": _NEEDS[-1][1]}
    return names.get(level, frozenset())
