"""Rotary embedding in generated C++: one pass over memory."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import Unit, function
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.errors import UnsupportedError

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-second half of x, first half of x) * sin, contiguous, shaped as x.

    Both products are rounded to the dtype of x, so it equals torch's own formula bit for bit.
    Source: Su et al. 2021, "RoFormer", in the form that turns the halves of a head.

    Args:
        x: (B, H, T, D), D even, on the CPU, float32 or bfloat16, with any strides.
        cos, sin: (B or 1, 1, T, D), of the dtype of x.

    Raises:
        UnsupportedError: there is no kernel for the dtype.
    """
    found = find(x.dtype)
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this rotary embedding: {found}")
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel() == 0:
        return out
    strides = (s for t in (cos, sin) for s in (0 if t.shape[0] == 1 else t.stride(0), t.stride(2)))
    fields = array(
        "q",
        (
            *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()),
            *(*x.shape, torch.get_num_threads(), *x.stride()[:3], *strides),
        ),
    )
    found(fields.buffer_info()[0])
    return out


@lru_cache(maxsize=16)
def unit_of(dtype: torch.dtype, target: Target) -> Unit | str:
    """The unit of a dtype on a target, or why there is none."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    source = assemble(target, ["rotary"], {}, {"io_t": NAMES[dtype]})
    # A fused multiply-add would leave one of the products unrounded.
    apart = replace(target, flags=(*target.flags, "-ffp-contract=off"))
    return Unit(f"rotary_{NAMES[dtype]}", source, apart)


def find(dtype: torch.dtype) -> Callable[[int], None] | str:
    """The compiled kernel of a dtype on this machine, or why there is none."""
    target = host_target()
    return target if isinstance(target, str) else _find(dtype, target)


@lru_cache(maxsize=16)
def _find(dtype: torch.dtype, target: Target) -> Callable[[int], None] | str:
    return function(unit_of(dtype, target), "rotary", ctypes.c_void_p)


def source_of(dtype: torch.dtype) -> str:
    """The generated code for a dtype on this machine, or why there is none."""
    target = host_target()
    unit = target if isinstance(target, str) else unit_of(dtype, target)
    return unit if isinstance(unit, str) else unit.source
