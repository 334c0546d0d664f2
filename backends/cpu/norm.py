"""RMSNorm and LayerNorm in generated C++: one pass over memory, sums in float32."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import Unit, function
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.errors import UnsupportedError

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_PACK = struct.Struct("10q2d")


@dataclass(frozen=True)
class NormForm:
    """y = (x - mean) / sqrt(mean of squares + eps) * (weight + offset) + bias.

    Attributes:
        centred: the mean is taken off, as LayerNorm does and RMSNorm does not.
        early: the quotient is rounded to the dtype of x before the weight is applied.
    """

    eps: float
    centred: bool = False
    offset: float = 0.0
    early: bool = False


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """x (..., C) normalised over its last dimension, contiguous, in the dtype of x.

    Args:
        x: on the CPU, float32 or bfloat16.
        weight, bias: (C), contiguous, of the dtype of x.

    Raises:
        UnsupportedError: there is no kernel for the dtype.
    """
    found = find(x.dtype)
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this normalisation: {found}")
    width = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    count = rows.shape[0]
    if count == 0 or width == 0:
        return out
    threads = min(torch.get_num_threads(), count)
    fields = _PACK.pack(
        *(rows.data_ptr(), 0 if weight is None else weight.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr(), count, width, rows.stride(0)),
        *(threads, form.centred, form.early, form.eps, form.offset),
    )
    found(fields)
    return out


@lru_cache(maxsize=16)
def unit_of(dtype: torch.dtype, target: Target) -> Unit | str:
    """The unit of a dtype on a target, or why there is none."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    source = assemble(target, ["norm"], {}, {"io_t": NAMES[dtype]})
    return Unit(f"norm_{NAMES[dtype]}", source, target)


def find(dtype: torch.dtype) -> Callable[[bytes], None] | str:
    """The compiled kernel of a dtype on this machine, or why there is none."""
    target = host_target()
    return target if isinstance(target, str) else _find(dtype, target)


@lru_cache(maxsize=16)
def _find(dtype: torch.dtype, target: Target) -> Callable[[bytes], None] | str:
    return function(unit_of(dtype, target), "norm", ctypes.c_char_p)


def source_of(dtype: torch.dtype) -> str:
    """The generated code for a dtype on this machine, or why there is none."""
    target = host_target()
    unit = target if isinstance(target, str) else unit_of(dtype, target)
    return unit if isinstance(unit, str) else unit.source
