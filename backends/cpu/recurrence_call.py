"""How tensors of a recurrence reach its kernels: dtypes, strides, the structs of the headers."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs


def ready(x: RecurrenceInputs) -> bool:
    """Whether every dtype is the kernel's."""
    kind, single = x.v.dtype, torch.float32
    return (
        x.q.dtype == kind
        and x.k.dtype == kind
        and (x.start is None or x.start.dtype == single)
        and (x.decay is None or x.decay.dtype == single)
        and (x.beta is None or x.beta.dtype == single)
        and x.erase is None
        and x.bonus is None
        and x.cu_seqlens is None
    )


def prepared(x: RecurrenceInputs) -> RecurrenceInputs:
    """Unit stride of the features; one dtype for q, k and v, float32 for the rest."""
    kind = x.v.dtype

    def wide(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t if t.dtype == torch.float32 else t.float()
        return t if t.dim() < 4 or t.stride(-1) == 1 else t.contiguous()

    def narrow(t: Tensor) -> Tensor:
        t = t if t.dtype == kind else t.to(kind)
        return t if t.stride(-1) == 1 else t.contiguous()

    cu = x.cu_seqlens
    return RecurrenceInputs(
        narrow(x.q),
        narrow(x.k),
        narrow(x.v),
        wide(x.decay),
        wide(x.beta),
        wide(x.erase),
        wide(x.add),
        None if x.bonus is None else x.bonus.float().contiguous(),
        None if cu is None else cu.to(torch.int32).contiguous(),
        None if x.start is None else x.start.float().contiguous(),
    )


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def rows_of(t: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides over batch, head and token; a constant per head has no token."""
    if t is None:
        return 0, 0, 0, 0
    if t.dim() == 1:
        return t.data_ptr(), 0, t.stride(0), 0
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def call_of(
    x: RecurrenceInputs, out: Tensor, end: Tensor | None, rows: int, threads: int, parts: int
) -> array[int]:
    """The struct `Call` of recurrence.hpp."""
    B, H, N, _ = x.q.shape
    call = array("q")
    for t in (x.q, x.k, x.v, out, x.decay, x.beta, x.erase, x.add):
        call.extend(rows_of(t))
    call.extend(pointer(t) for t in (x.bonus, x.start, end, x.cu_seqlens))
    call.extend((B, H, x.k.shape[1], N, rows, threads, parts))
    return call
