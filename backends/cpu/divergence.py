"""Divergence of logits and its gradient in one pass of generated C++, float32 and bfloat16."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import Unit, function
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.errors import UnsupportedError

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    ce: float,
    weight: float,
    scale: float,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of (1 - ce) KL(teacher || student) + weight * cross-entropy, and its slope.

    Args:
        student, teacher: (T, V) logits on the CPU, one dtype, float32 or bfloat16.
        labels: (T) int64; negative where there is none.
        ce, weight: of the two terms.
        scale: the slope is multiplied by it.
        into: where the slope goes: a tensor of its size and dtype, with rows in one piece, which
            may be the student's.

    Returns:
        A float64 scalar, and (T, V) in the dtype of the logits.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    run = find(student.dtype)
    if isinstance(run, str):
        raise UnsupportedError(f"no CPU kernel serves this divergence: {run}")
    student, teacher = (t if t.stride(-1) == 1 else t.contiguous() for t in (student, teacher))
    rows, vocabulary = student.shape
    labels = labels.contiguous()
    slope = torch.empty((rows, vocabulary), dtype=student.dtype) if into is None else into
    losses = torch.empty(rows, dtype=torch.float64)
    call = struct.pack(
        "11q3d",
        *(t.data_ptr() for t in (student, teacher, labels, slope, losses)),
        *(rows, vocabulary, student.stride(0), teacher.stride(0), slope.stride(0)),
        torch.get_num_threads(),
        *(ce, weight, scale),
    )
    run(ctypes.cast(ctypes.c_char_p(call), ctypes.c_void_p))
    return losses.sum(), slope


@lru_cache(maxsize=16)
def unit_of(dtype: torch.dtype, target: Target) -> Unit | str:
    """The unit of a dtype on a target, or why there is none."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    source = assemble(target, ["divergence"], {}, {"io_t": NAMES[dtype]})
    return Unit(f"divergence_{NAMES[dtype]}", source, target)


@lru_cache(maxsize=16)
def find(dtype: torch.dtype) -> Callable[[ctypes.c_void_p], None] | str:
    """The compiled kernel of a dtype on this machine, or why there is none."""
    target = host_target()
    if isinstance(target, str):
        return target
    return function(unit_of(dtype, target), "divergence", ctypes.c_void_p)
