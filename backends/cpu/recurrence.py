"""Raw `Recurrence` kernels in generated C++: chunks for sequences, single steps for few tokens."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.cache import VARIABLE as CACHE
from rewriter.backends.cpu import recurrence_columns as columns
from rewriter.backends.cpu import recurrence_forms as forms
from rewriter.backends.cpu.build import NoKernel, Unit, load
from rewriter.backends.cpu.recurrence_both import backward_both, forward_both, scans
from rewriter.backends.cpu.recurrence_call import call_of, pointer, prepared, ready, rows_of
from rewriter.backends.cpu.recurrence_step import Step, stepper
from rewriter.backends.cpu.recurrence_unit import (
    CTYPES,
    backward_unit,
    chunk_length,
    forward_unit,
    step_unit,
)
from rewriter.backends.cpu.target import VARIABLE as ISA
from rewriter.backends.cpu.target import Target, host_target
from rewriter.backends.inputs import RecurrenceGrads, RecurrenceInputs
from rewriter.backends.reference.recurrence.kernel import recurrence as reference
from rewriter.errors import UnsupportedError
from rewriter.ir.recurrence import Recurrence

WIDEST = 256
Kernel = Callable[[int, int], None]
MakeUnit = Callable[[Recurrence, torch.dtype, Target], Unit]


def decline(spec: Recurrence, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why there is no kernel for the spec, as one sentence, or None."""
    if dtype not in CTYPES:
        return f"its recurrence takes float32 and bfloat16, not {dtype}".replace("torch.", "")
    if spec.normaliser == "max":
        return "its recurrence has no max normaliser"
    if not spec.causal and spec.decay != "none":
        ahead, behind = scans(spec)
        single = torch.float32
        return decline(ahead, single, needs_grad) or decline(behind, single, needs_grad)
    if not 1 <= spec.key_dim <= WIDEST or not 1 <= spec.value_dim <= WIDEST:
        widths = f"{spec.key_dim} and {spec.value_dim}"
        return f"its recurrence takes widths up to {WIDEST}, not {widths}"
    found: object
    if needs_grad and spec.causal:
        found = _kernel(spec, dtype, backward_unit, "recurrence_backward")
    elif spec.causal:
        found = stepper(spec, dtype)
    else:
        found = _kernel(spec, dtype, forward_unit, "recurrence_forward")
    return found.reason if isinstance(found, NoKernel) else None


def forward(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Read and write the state.

    Args:
        spec: what to compute.
        x: tensors on the CPU with any strides; see `RecurrenceInputs`.

    Returns:
        Outputs (B, H, N, Dv) in the dtype of v, and the end state, float32, contiguous.

    Raises:
        UnsupportedError: there is no kernel; `decline` says why beforehand.
    """
    if spec.causal and x.q.shape[2] <= forms.LENGTHS[-1]:
        where = (os.environ.get(CACHE), os.environ.get(ISA))
        if x.q.shape[2] <= forms.FEW or x.q.shape[2] <= _steps(spec, x.v.dtype, where):
            return _by_steps(spec, x)
    if not spec.causal and spec.decay != "none":
        return forward_both(spec, x, forward)
    return _by_chunks(spec, x)


def _by_steps(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    step = _step(spec, x.v.dtype)
    x = x if ready(x) else prepared(x)
    tensors = (x.q, x.k, x.v, x.decay, x.beta, x.erase, x.add, x.bonus)
    return step(*tensors, x.start, x.cu_seqlens)


def _by_chunks(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    x = prepared(x)
    B, H, N, _ = x.q.shape
    out = x.v.new_empty(B, H, N, spec.value_dim)
    rows = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    count = columns.shares(spec, x, rows, torch.get_num_threads())
    if count == 1:
        return out, _run(spec, x, out)
    return out, columns.joined(spec, _run(*columns.shared(spec, x, out, count)))


def _run(spec: Recurrence, x: RecurrenceInputs, out: Tensor) -> Tensor:
    """Fill `out`; returns the end state."""
    kernel = _found(spec, x.v.dtype, forward_unit, "recurrence_forward")
    B, _, N, _ = x.q.shape
    Hkv = x.k.shape[1]
    rows = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    end = x.v.new_empty(rows, Hkv, spec.key_dim, spec.state_width, dtype=torch.float32)
    threads = torch.get_num_threads()
    parts = _parts(spec, rows * Hkv, N, threads)
    between = None
    if parts > 1 or not spec.causal:
        between = end.new_empty(rows * Hkv * parts, *end.shape[2:])
    call = call_of(x, out, end, rows, threads, parts)
    kernel(call.buffer_info()[0], pointer(between))
    return end


def backward(
    spec: Recurrence, x: RecurrenceInputs, grad_out: Tensor, grad_end: Tensor | None
) -> RecurrenceGrads:
    """Gradients of a call. Only the states between chunks are kept, and only during the call.

    Args:
        spec, x: of the forward call.
        grad_out: gradient of the outputs.
        grad_end: gradient of the end state, None for zero; of no account if not causal.

    Raises:
        UnsupportedError: there is no kernel; `decline` says why beforehand.
    """
    if not spec.causal and spec.decay != "none":
        return backward_both(spec, x, grad_out, forward, backward)
    if not spec.causal:
        return _global_backward(spec, x, grad_out)
    given, x = x, prepared(x)
    kernel = _found(spec, x.v.dtype, backward_unit, "recurrence_backward")
    rows = x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    grad = grad_out.to(x.v.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    end = None if grad_end is None else grad_end.float().contiguous()
    q, k, v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x.q, x.k, x.v))
    decay = beta = erase = add = bonus = start = None
    if x.decay is not None:
        # What is shared by all rows collects one number per row; they are summed below.
        shape = (rows, k.shape[1], 1) if spec.decay == "head" else x.decay.shape
        decay = torch.zeros(shape, dtype=torch.float32)
    if x.beta is not None:
        beta = torch.empty(x.beta.shape, dtype=torch.float32)
    if x.erase is not None and x.add is not None:
        erase = torch.empty(x.erase.shape, dtype=torch.float32)
        add = torch.empty(x.add.shape, dtype=torch.float32)
    if x.bonus is not None:
        bonus = torch.zeros((rows, *x.bonus.shape), dtype=torch.float32)
    if x.start is not None:
        start = torch.empty_like(x.start)
    call = call_of(x, grad, None, rows, torch.get_num_threads(), 1)
    grads = array("q")
    for t in (grad, q, k, v, decay, beta, erase, add):
        grads.extend(rows_of(t))
    grads.extend((pointer(bonus), pointer(end), pointer(start)))
    kernel(call.buffer_info()[0], grads.buffer_info()[0])
    if decay is not None and spec.decay == "head":
        decay = decay.sum((0, 2))

    def like(t: Tensor | None, source: Tensor | None) -> Tensor | None:
        return None if t is None or source is None else t.to(source.dtype)

    return RecurrenceGrads(
        q.to(given.q.dtype),
        k.to(given.k.dtype),
        v.to(given.v.dtype),
        like(decay, given.decay),
        like(beta, given.beta),
        like(erase, given.erase),
        like(add, given.add),
        bonus=like(None if bonus is None else bonus.sum(0), given.bonus),
        start=like(start, given.start),
    )


def _global_backward(spec: Recurrence, x: RecurrenceInputs, grad_out: Tensor) -> RecurrenceGrads:
    """A few large products, which the reference states as well as a kernel would.

    `vjp` brings a tape of its own: inside an operator autograd records nothing.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(spec, q, k, v, cu_seqlens=x.cu_seqlens)[0]

    pulled: tuple[Any, ...] = torch.func.vjp(run, x.q.detach(), x.k.detach(), x.v.detach())
    out, pull = pulled
    dq, dk, dv = pull(grad_out.to(out.dtype))
    start = None if x.start is None else torch.zeros_like(x.start)
    return RecurrenceGrads(dq, dk, dv, start=start)


def _parts(spec: Recurrence, heads: int, tokens: int, threads: int) -> int:
    """Parts of the sequence, so that every thread has work; a correction runs in one."""
    if spec.correction != "none" or heads >= threads:
        return 1
    return max(1, min(-(-threads // heads), tokens // (8 * chunk_length(spec))))


@lru_cache(maxsize=512)
def _steps(spec: Recurrence, dtype: torch.dtype, where: tuple[str | None, str | None]) -> int:
    """Tokens up to which single steps are faster than a chunk on this machine."""
    target = host_target()
    if isinstance(target, str):
        return forms.FEW
    source = forward_unit(spec, dtype, target).source + step_unit(spec, dtype, target).source
    return forms.limit(spec, dtype, source, partial(_by_steps, spec), partial(_by_chunks, spec))


def _step(spec: Recurrence, dtype: torch.dtype) -> Step:
    step = stepper(spec, dtype)
    if isinstance(step, NoKernel):
        raise UnsupportedError(f"no CPU kernel serves this Recurrence call: {step.reason}")
    return step


def _found(spec: Recurrence, dtype: torch.dtype, make: MakeUnit, name: str) -> Kernel:
    kernel = _kernel(spec, dtype, make, name)
    if isinstance(kernel, NoKernel):
        raise UnsupportedError(f"no CPU kernel serves this Recurrence call: {kernel.reason}")
    return kernel


@lru_cache(maxsize=512)
def _kernel(spec: Recurrence, dtype: torch.dtype, make: MakeUnit, name: str) -> Kernel | NoKernel:
    target = host_target()
    if isinstance(target, str):
        return NoKernel(target)
    library = load(make(spec, dtype, target))
    if isinstance(library, NoKernel):
        return library
    function = getattr(library, name)
    function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_int64), None
    kernel: Kernel = function
    return kernel
