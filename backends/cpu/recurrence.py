"""Raw `Recurrence` kernels in generated C++: chunks for sequences, single steps for few tokens."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import NoKernel, load
from rewriter.backends.cpu.recurrence_step import stepper
from rewriter.backends.cpu.recurrence_unit import (
    CTYPES,
    backward_unit,
    chunk_length,
    forward_unit,
)
from rewriter.backends.cpu.target import Target, host_target
from rewriter.backends.inputs import RecurrenceGrads, RecurrenceInputs
from rewriter.backends.reference.recurrence.kernel import recurrence as reference
from rewriter.ir.recurrence import Recurrence

FEW = 8  # tokens up to which the step form is the faster one
Call = Callable[..., None]


def decline(spec: Recurrence, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why there is no kernel for the spec, as one sentence, or None."""
    target = host_target()
    if isinstance(target, str):
        return target
    if dtype not in CTYPES:
        return f"its recurrence takes float32 and bfloat16, not {dtype}".replace("torch.", "")
    if not 1 <= spec.key_dim <= 256 or not 1 <= spec.value_dim <= 256:
        return f"its recurrence takes widths up to 256, not {spec.key_dim} and {spec.value_dim}"
    if spec.normaliser == "max":
        return "its recurrence has no max normaliser"
    if not spec.causal and spec.decay != "none":
        return "its bidirectional recurrence has no decay"
    if needs_grad and spec.correction == "untied":
        return "its recurrence has no backward pass for an untied correction"
    if needs_grad and spec.read == "exclusive":
        return "its recurrence has a backward pass for inclusive reads only"
    problem = stepper(spec, dtype) if spec.causal else _forward(spec, dtype, target)
    return problem.reason if isinstance(problem, NoKernel) else None


def forward(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in the dtype of v and the end state, float32; see `inputs`."""
    if spec.causal and (x.q.shape[2] <= FEW or spec.correction == "untied"):
        step = stepper(spec, x.v.dtype)
        assert not isinstance(step, NoKernel)
        if not _ready(x):
            x = _prepared(x)
        tensors = (x.q, x.k, x.v, x.decay, x.beta, x.erase, x.add, x.bonus)
        return step(*tensors, x.start, x.cu_seqlens)
    x = _prepared(x)
    B, H, N, _ = x.q.shape
    Hkv = x.k.shape[1]
    rows = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    out = x.v.new_empty(B, H, N, spec.value_dim)
    end = x.v.new_empty(rows, Hkv, spec.key_dim, spec.state_width, dtype=torch.float32)
    target = host_target()
    assert isinstance(target, Target)
    threads = torch.get_num_threads()
    parts = _parts(spec, rows * Hkv, N, threads)
    between = None
    if parts > 1 or not spec.causal:
        between = end.new_empty(rows * Hkv * parts, *end.shape[2:])
    call = _call(x, out, end, rows, threads, parts)
    kernel = _forward(spec, x.v.dtype, target)
    assert not isinstance(kernel, NoKernel)
    kernel(call.buffer_info()[0], _pointer(between))
    return out, end


def backward(
    spec: Recurrence, x: RecurrenceInputs, grad_out: Tensor, grad_end: Tensor | None
) -> RecurrenceGrads:
    """Gradients of a call; `grad_end` None is zero. See `inputs`."""
    if not spec.causal:
        return _global_backward(spec, x, grad_out)
    given, x = x, _prepared(x)
    B = x.q.shape[0]
    rows = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    threads = torch.get_num_threads()
    target = host_target()
    assert isinstance(target, Target)
    kernel = _backward(spec, x.v.dtype, target)
    assert not isinstance(kernel, NoKernel)
    grad = grad_out.to(x.v.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    end = None if grad_end is None else grad_end.float().contiguous()
    q, k, v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x.q, x.k, x.v))
    decay = beta = start = None
    if x.decay is not None:
        # A constant per head collects one number per row, which are summed below.
        shape = (rows, x.k.shape[1], 1) if spec.decay == "head" else x.decay.shape
        decay = torch.zeros(shape, dtype=torch.float32, device=x.v.device)
    if x.beta is not None:
        beta = torch.empty(x.beta.shape, dtype=torch.float32, device=x.v.device)
    if x.start is not None:
        start = torch.empty_like(x.start)
    call = _call(x, grad, None, rows, threads, 1)
    grads = array("q")
    for t in (grad, q, k, v, decay, beta):
        grads.extend(_rows(t))
    grads.extend((_pointer(end), _pointer(start)))
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
        start=like(start, given.start),
    )


def _global_backward(spec: Recurrence, x: RecurrenceInputs, grad_out: Tensor) -> RecurrenceGrads:
    """A few large products, which the reference states as well as a kernel would."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
        out, _ = reference(spec, q, k, v, cu_seqlens=x.cu_seqlens)
        grads = torch.autograd.grad(out, (q, k, v), grad_out)
    start = None if x.start is None else torch.zeros_like(x.start)
    return RecurrenceGrads(*grads, start=start)


def _ready(x: RecurrenceInputs) -> bool:
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


def _prepared(x: RecurrenceInputs) -> RecurrenceInputs:
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


def _parts(spec: Recurrence, heads: int, tokens: int, threads: int) -> int:
    """Parts of the sequence, so that every thread has work; a correction runs in one."""
    if spec.correction != "none" or heads >= threads:
        return 1
    wanted = 2 * threads if spec.causal else threads
    return max(1, min(-(-wanted // heads), tokens // (8 * chunk_length(spec))))


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides over batch, head and token; a constant per head has no token."""
    if t is None:
        return 0, 0, 0, 0
    if t.dim() == 1:
        return t.data_ptr(), 0, t.stride(0), 0
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def _call(
    x: RecurrenceInputs, out: Tensor, end: Tensor | None, rows: int, threads: int, parts: int
) -> array[int]:
    """The struct `Call` of recurrence.hpp."""
    B, H, N, _ = x.q.shape
    call = array("q")
    for t in (x.q, x.k, x.v, out, x.decay, x.beta, x.erase, x.add):
        call.extend(_rows(t))
    call.extend(_pointer(t) for t in (x.bonus, x.start, end, x.cu_seqlens))
    call.extend((B, H, x.k.shape[1], N, rows, threads, parts))
    return call


@lru_cache(maxsize=256)
def _forward(spec: Recurrence, dtype: torch.dtype, target: Target) -> Call | NoKernel:
    return _bound(load(forward_unit(spec, dtype, target)), "recurrence_forward", 2)


@lru_cache(maxsize=256)
def _backward(spec: Recurrence, dtype: torch.dtype, target: Target) -> Call | NoKernel:
    return _bound(load(backward_unit(spec, dtype, target)), "recurrence_backward", 2)


def _bound(library: ctypes.CDLL | NoKernel, name: str, pointers: int) -> Call | NoKernel:
    if isinstance(library, NoKernel):
        return library
    function = getattr(library, name)
    function.argtypes = (ctypes.c_int64,) * pointers
    function.restype = None
    kernel: Call = function
    return kernel
