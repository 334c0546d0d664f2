"""What a kernel may use on each GPU, and the block sizes that fit there without spills.

All shipped configurations are in this file. They are chosen from ahead-of-time compiles
(docs/triton_resources.md) and not yet timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Target:
    """A GPU family.

    Attributes:
        name: 'sm_80', 'sm_90' or 'gfx942'.
        backend, arch, warp: what Triton's `GPUTarget` takes.
        shared: bytes of shared memory that one program may use.
        matrix: mnemonics of its matrix instructions.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: tuple[str, ...]


SM_80 = Target("sm_80", "cuda", 80, 32, 163 * 1024, ("HMMA",))
SM_90 = Target("sm_90", "cuda", 90, 32, 227 * 1024, ("HGMMA", "HMMA"))
GFX942 = Target("gfx942", "hip", "gfx942", 64, 64 * 1024, ("mfma",))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = (SM_80, SM_90, GFX942)


@lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    """The target whose configurations suit a device; the CPU (interpreter) takes sm_80's."""
    if device.type != "cuda":
        return SM_80
    if torch.version.hip is not None:
        return GFX942
    return SM_90 if torch.cuda.get_device_capability(device) >= (9, 0) else SM_80


@dataclass(frozen=True)
class Config:
    """Block sizes and compile options of a kernel.

    Attributes:
        rows: tokens of a block (a chunk, or queries).
        keys: keys of a block; for recurrences key channels.
        values: value channels of a block.
        warps, stages: compile options.
    """

    rows: int = 64
    keys: int = 64
    values: int = 64
    warps: int = 4
    stages: int = 2


CHUNK = 64  # tokens of a chunk, everywhere: chunk states are laid out by it

_DEFAULT = Config()
_KEY_GRADIENTS = (
    ("*", 64, Config(rows=32, keys=64, warps=4)),
    ("gfx942", 128, Config(rows=32, keys=64, warps=4, stages=1)),
    ("sm_80", 128, Config(rows=64, keys=64, warps=8)),
    ("*", 128, Config(rows=32, keys=64, warps=8)),
    ("gfx942", 256, Config(rows=16, keys=16, warps=8, stages=1)),
    ("*", 256, Config(rows=32, keys=32, warps=8, stages=1)),
)
# (kernel, target or '*', largest head dim it serves), the first that fits is taken.
_TABLE: Mapping[str, tuple[tuple[str, int, Config], ...]] = MappingProxyType(
    {
        "delta_states": (
            ("*", 64, Config(values=64)),
            ("gfx942", 128, Config(values=32, stages=1)),
            ("*", 128, Config(values=32)),
            ("*", 256, Config(values=16, stages=1)),
        ),
        "delta_backstates": (
            ("*", 64, Config(values=32)),
            ("gfx942", 128, Config(values=32)),
            ("*", 128, Config(values=16)),
            ("*", 256, Config(values=16, stages=1)),
        ),
        "unsolve": (("gfx942", 256, Config()), ("*", 256, Config(keys=32, values=32, warps=8))),
        "pairs": (("*", 256, Config(keys=32)),),
        "channel_gradients": (
            ("gfx942", 256, Config(keys=32)),
            ("*", 256, Config(keys=32, warps=8)),
        ),
        "queries_and_keys": (
            ("gfx942", 256, Config()),
            ("sm_80", 128, Config(keys=32, warps=8)),
            ("sm_80", 256, Config(keys=32, values=32, warps=8)),
            ("*", 256, Config(warps=8)),
        ),
        "attend_queries": (
            ("sm_80", 64, Config(rows=64, keys=32, warps=4)),
            ("*", 64, Config(rows=64, keys=64, warps=4)),
            ("gfx942", 128, Config(rows=64, keys=32, warps=4, stages=1)),
            ("sm_90", 128, Config(rows=64, keys=32, warps=8)),
            ("*", 128, Config(rows=64, keys=64, warps=8)),
            ("gfx942", 256, Config(rows=32, keys=32, warps=4, stages=1)),
            ("*", 256, Config(rows=32, keys=32, warps=8, stages=1)),
        ),
        "attend_keys": (("sm_80", 64, Config(rows=64, keys=32, warps=4)), *_KEY_GRADIENTS),
        "listed_keys": (("sm_80", 64, Config(32, 32, warps=8, stages=1)), *_KEY_GRADIENTS),
        "attend": (
            ("gfx942", 64, Config(rows=64, keys=64, warps=4, stages=1)),
            ("*", 64, Config(rows=64, keys=64, warps=4)),
            ("gfx942", 128, Config(rows=64, keys=32, warps=4, stages=1)),
            ("*", 128, Config(rows=64, keys=64, warps=8)),
            ("*", 256, Config(rows=64, keys=32, warps=8, stages=1)),
        ),
    }
)


def config(kernel: str, target: Target, dim: int, four_bytes: bool = False) -> Config:
    """The configuration of a kernel for a head dim (the larger of Dk and Dv).

    Args:
        four_bytes: the values are float32; stages are halved to keep within shared memory.
    """
    for name, largest, chosen in _TABLE.get(kernel, ()):
        if name in ("*", target.name) and dim <= largest:
            if four_bytes:
                return Config(chosen.rows, chosen.keys, chosen.values, max(chosen.warps, 8), 1)
            return chosen
    return _DEFAULT
