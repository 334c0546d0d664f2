"""A list of instructions in generated C++ that runs a whole decode step.

One unit serves every model on an instruction set; what differs between models is the list. Values
are float32 numbers in an arena; weights are read where they are, float32 or bfloat16.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from rewriter.backends.cpu.build import NoKernel, Unit, load
from rewriter.backends.cpu.decode import find as find_decode
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import host_target
from rewriter.ir.decode import Decode

# The order of `Op` in step.hpp.
UNARY = (
    *("copy", "neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "cos", "sin"),
    *("tanh", "sigmoid", "silu", "relu", "gelu", "gelu_tanh", "pow", "affine", "load_bf16"),
)
BINARY = ("add", "sub", "mul", "div", "max", "min")
OTHERS = ("mean", "sum", "layer_norm", "rms_norm", "embed", "linear", "attend")
CODES = {name: code for code, name in enumerate((*UNARY, *BINARY, *OTHERS))}
SLOT_FIELDS = 10  # of struct Slot: pointers, strides, first and end
MOST_SPLITS = 32  # ranges that the keys of a head are cut into

_PACK = struct.Struct("=22q2d8q")
Four = tuple[int, int, int, int]
NONE: Four = (0, 0, 0, 0)


@dataclass(frozen=True)
class Instruction:
    """One entry of the list; addresses and strides as `struct Instruction` of step.hpp has them.

    Attributes:
        op: a name of `CODES`.
        round: the result is rounded to bfloat16 (of 'attend': the cache is bfloat16).
        out, a, b, c: addresses, 0 for none.
        sizes, so, sa, sb: sizes and strides (in elements) of out, a and b.
        s, t: numbers that the operation takes.
        x: up to eight more integers.
    """

    op: str
    out: int
    a: int
    b: int = 0
    c: int = 0
    sizes: Four = NONE
    so: Four = NONE
    sa: Four = NONE
    sb: Four = NONE
    s: float = 0.0
    t: float = 0.0
    x: tuple[int, ...] = ()
    round: bool = False

    def pack(self) -> bytes:
        more = (*self.x, *(0,) * (8 - len(self.x)))
        return _PACK.pack(
            *(CODES[self.op], self.round, self.out, self.a, self.b, self.c),
            *(*self.sizes, *self.so, *self.sa, *self.sb),
            *(self.s, self.t),
            *more,
        )


@dataclass(frozen=True)
class Listing:
    """Packed instructions and how many they are."""

    data: bytes
    count: int


def listing(instructions: list[Instruction]) -> Listing:
    return Listing(b"".join(i.pack() for i in instructions), len(instructions))


@lru_cache(maxsize=1)
def runner() -> Callable[[bytes, int, int], None] | NoKernel:
    """The compiled `step(list, count, threads)`, or why there is none."""
    target = host_target()
    if isinstance(target, str):
        return NoKernel(target)
    source = assemble(target, ["math", "gemv", "step"], {})
    library = load(Unit("step", source, target))
    if isinstance(library, NoKernel):
        return library
    run = library.step
    run.argtypes, run.restype = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long], None
    found: Callable[[bytes, int, int], None] = run
    return found


@dataclass(frozen=True)
class AttendKernel:
    """The address of a `Decode` kernel and the scratch numbers that a query row needs."""

    address: int
    row_floats: int

    def scratch(self, batch: int, heads: int, key_dim: int, value_dim: int) -> int:
        """Floats of scratch memory of one 'attend' instruction."""
        return batch * heads * (1 + key_dim + value_dim + MOST_SPLITS * self.row_floats)


def attend_kernel(spec: Decode, dtype: torch.dtype) -> AttendKernel | NoKernel:
    """The `Decode` kernel of a contiguous cache, as an address."""
    found = find_decode(spec, dtype)
    if isinstance(found, str):
        return NoKernel(found)
    address = ctypes.cast(found.run, ctypes.c_void_p).value  # type: ignore[arg-type]
    return AttendKernel(address or 0, found.row_floats)
