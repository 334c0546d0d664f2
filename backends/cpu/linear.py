"""Linear layers in generated C++: float32 and bfloat16, sums always in float32.

One unit for each dtype; sizes, strides and bias are arguments. The weights stay as they are: they
are packed on the fly, a few megabytes at a time, into scratch memory of the call.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel; `band` rows of x are worked on at a time, `panel` columns of the output."""

    run: Callable[[int], None]
    band: int
    panel: int


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N): (..., N) in the dtype of x.

    Tensors are on the CPU and share one dtype, float32 or bfloat16; the weight may be the transpose
    of a contiguous matrix. The result is contiguous.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    found = find(x.dtype)
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this linear layer: {found}")
    N, K = weight.shape
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1 and weight.stride(0) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    M = rows.shape[0]
    if min(M, N) == 0:
        return out
    if K == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    threads = torch.get_num_threads()
    if M <= SMALL and weight.stride(1) == 1:
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
            *(rows.stride(0), *weight.stride(), N, block, threads),
        ),
    )
    found.run(fields.buffer_info()[0])
    return out


@lru_cache(maxsize=16)
def unit_of(dtype: torch.dtype, target: Target) -> Unit | str:
    """The unit of a dtype on a target, or why there is none."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    source = assemble(target, ["linear"], {"DEPTH": _DEPTH, "SMALL": SMALL}, {"io_t": NAMES[dtype]})
    return Unit(f"linear_{NAMES[dtype]}", source, target)


@lru_cache(maxsize=16)
def find(dtype: torch.dtype) -> Kernel | str:
    """The compiled kernel of a dtype on this machine, or why there is none."""
    target = host_target()
    if isinstance(target, str):
        return target
    unit = unit_of(dtype, target)
    library = NoKernel(unit) if isinstance(unit, str) else load(unit)
    if isinstance(library, NoKernel):
        return library.reason
    run = library.linear
    run.argtypes, run.restype = [ctypes.c_void_p], None
    return Kernel(run, library.linear_band(), library.linear_panel())
