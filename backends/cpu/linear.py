"""Linear layers in generated C++: float32 and bfloat16, sums always in float32.

One unit for each dtype; sizes, strides and bias are arguments. The weights stay as they are: they
are packed on the fly, a few megabytes at a time, into scratch memory of the call.

On processors with matrix tiles (AMX) many rows are multiplied as bfloat16 numbers whose products
are summed in float32. A float32 factor is three such numbers, which together hold all of its bits;
where torch.set_float32_matmul_precision allows less than 'highest' it is two, 16 bits.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import NoKernel, Unit, load
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.errors import UnsupportedError

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
SMALL = 8  # rows up to which the weights are used as they are read
_PACKED = 2**20  # floats of packed weights that stay in the last-level cache
_DEPTH = 384
_LEAST = 96  # columns of a block, however long they are
_TILE = 32  # rows and columns of a block of tiles; numbers along K in one step
_TILED = 2**23  # bytes of tiles of the weights at a time
_BAND = 2**20  # bytes of tiles of x of one thread: they stay in L2
GATES = {"silu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4, "identity": 5}


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel; `band` rows of x are worked on at a time, `panel` columns of the output.

    `tiles` runs many rows on matrix tiles, each number as `parts` bfloat16 numbers.
    """

    run: Callable[[int], None]
    band: int
    panel: int
    tiles: Callable[[int], None] | None = None
    parts: int = 1


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N): (..., N) in the dtype of x.

    Tensors are on the CPU and share one dtype, float32 or bfloat16; the weight may be the transpose
    of a contiguous matrix. The result is contiguous.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    return _run(_kernel(x.dtype), x, weight, bias)


@dataclass(frozen=True)
class Gate:
    """The other matrix of a gated layer: the same size, dtype and strides as the first.

    Attributes:
        activation: a name in `GATES`.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate) -> Tensor:
    """f(x gate^T + gate bias) * (x weight^T + bias), (..., N), by one pass over x on matrix tiles.

    Numbers are rounded to the dtype of x where a model rounds that computes one after the other.
    Tensors as `forward` takes them.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    found = _kernel(x.dtype)
    if found.tiles is None:
        raise UnsupportedError("gated layers need matrix tiles, which this processor has not")
    if gate.weight.stride() != weight.stride():
        raise UnsupportedError("the two matrices of a gated layer lie in different orders")
    return _run(found, x, weight, bias, gate)


def _kernel(dtype: torch.dtype) -> Kernel:
    found = find(dtype)
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this linear layer: {found}")
    return found


def _run(
    found: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate | None = None
) -> Tensor:
    N, K = weight.shape
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    other = None if gate is None else gate.weight
    if weight.stride(1) != 1 and weight.stride(0) != 1:
        weight, other = weight.contiguous(), None if other is None else other.contiguous()
    bias = None if bias is None else bias.contiguous()
    shift = None if gate is None or gate.bias is None else gate.bias.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    M = rows.shape[0]
    if min(M, N) == 0:
        return out
    if K == 0 and gate is not None:
        raise UnsupportedError("a gated layer without inputs")
    if K == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    threads = torch.get_num_threads()
    run, band = found.run, found.band
    if gate is not None or (M > SMALL and found.tiles is not None):
        assert found.tiles is not None
        run, matrices = found.tiles, 1 if gate is None else 2
        numbers = -(-K // _TILE) * _TILE * found.parts  # of a row or column of tiles
        band = even_band(M, min(256, _BAND // (2 * numbers * matrices)), threads)
        block = _rounded(min(max(_TILED // (2 * numbers * matrices), 1), N))
        own = band * (numbers + 2 * _TILE * matrices)
        floats = (block * matrices * numbers + threads * own) // 2
    elif M <= SMALL and weight.stride(1) == 1:
        block, floats = 0, M * (K + 64)
    else:
        block = min(max(_PACKED // K, _LEAST), N)
        block = -(-block // found.panel) * found.panel
        floats = block * K + threads * found.band * (_DEPTH + block)
    scratch = torch.empty(floats, dtype=torch.float32)
    fields = array(
        "q",
        (
            *(rows.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(out.data_ptr(), scratch.data_ptr(), M, N, K),
            *(rows.stride(0), *weight.stride(), N, block, threads, band),
            *(0 if other is None else other.data_ptr(), 0 if shift is None else shift.data_ptr()),
            0 if gate is None else GATES[gate.activation],
        ),
    )
    run(fields.buffer_info()[0])
    return out


def even_band(rows: int, most: int, threads: int) -> int:
    """Rows of a band of tiles: at most about `most`, and so that threads end at the same time."""
    most = max(_TILE, most // _TILE * _TILE)
    sizes = range(most, max(most // 2, _TILE) - 1, -_TILE)
    longest = {size: -(-rows // (size * threads)) * size for size in sizes}
    return min(_rounded(rows), min(sizes, key=lambda size: (longest[size], -size)))


def _rounded(n: int) -> int:
    return -(-n // _TILE) * _TILE


def parts_of(dtype: torch.dtype, target: Target) -> int:
    """bfloat16 numbers that stand for one number on matrix tiles; 0 without tiles."""
    if not target.tiles:
        return 0
    return 1 if dtype != torch.float32 else 3 if precision(dtype) == "highest" else 2


def precision(dtype: torch.dtype) -> str:
    """How exact products of a dtype have to be, in torch's words; '' where there is no choice."""
    if dtype != torch.float32:
        return ""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set in another way that has no such word
        return "highest"


@lru_cache(maxsize=16)
def unit_of(dtype: torch.dtype, target: Target, parts: int = 0) -> Unit | str:
    """The unit of a dtype on a target, or why there is none. `parts`: see `parts_of`."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    constants = {"DEPTH": _DEPTH, "SMALL": SMALL}
    types, name = {"io_t": NAMES[dtype]}, f"linear_{NAMES[dtype]}"
    if not parts:
        return Unit(name, assemble(target, ["linear"], constants, types), target)
    constants["PARTS"] = parts
    source = assemble(target, ["tiles", "linear_tiles"], constants, types, split="linear")
    return Unit(f"{name}_{parts}", source, target)


def find(dtype: torch.dtype) -> Kernel | str:
    """The compiled kernel of a dtype on this machine, or why there is none."""
    target = host_target()
    if isinstance(target, str):
        return target
    return _find(dtype, target, parts_of(dtype, target))


@lru_cache(maxsize=16)
def _find(dtype: torch.dtype, target: Target, parts: int) -> Kernel | str:
    unit = unit_of(dtype, target, parts)
    library = NoKernel(unit) if isinstance(unit, str) else load(unit)
    if isinstance(library, NoKernel):
        return library.reason
    run = library.linear
    run.argtypes, run.restype = [ctypes.c_void_p], None
    found = Kernel(run, library.linear_band(), library.linear_panel())
    if not parts:
        return found
    tiles = library.linear_tiles
    tiles.argtypes, tiles.restype = [ctypes.c_void_p], None
    return replace(found, tiles=tiles, parts=parts)


def source_of(dtype: torch.dtype) -> str:
    """The generated code for a dtype on this machine, or why there is none."""
    target = host_target()
    unit = target if isinstance(target, str) else unit_of(dtype, target, parts_of(dtype, target))
    return unit if isinstance(unit, str) else unit.source
