"""Single steps of a recurrence with as little between the caller and the kernel as possible."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.cpu.build import NoKernel, load
from rewriter.backends.cpu.recurrence_unit import step_unit
from rewriter.backends.cpu.target import Target, host_target
from rewriter.ir.recurrence import Recurrence

PARALLEL = 1 << 18  # state elements from which a step is worth waking threads
Step = Callable[..., tuple[Tensor, Tensor]]
_PACK = struct.Struct("17q").pack


def fixed_step(
    spec: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    add: Tensor | None = None,
    bonus: Tensor | None = None,
) -> Callable[[], object] | NoKernel:
    """A step on fixed buffers: each call reads the inputs as they are now, and writes the rest.

    Nothing is allocated, checked or looked up in a call, so it costs little more than its
    arithmetic: the form for a decoding loop whose buffers do not move.

    Args:
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv) of one dtype.
        out: (B, H, n, Dv), written.
        state: (B, Hkv, Dk, state_width) float32, updated in place.
        decay, beta, erase, add, bonus: as the spec has them, float32.

    Raises:
        ValueError: a tensor is not contiguous, or not of the dtype or shape above.
    """
    target = host_target()
    if isinstance(target, str):
        return NoKernel(target)
    kernel = _kernel(spec, v.dtype, target)
    if isinstance(kernel, NoKernel):
        return kernel
    rows, heads, tokens, _ = q.shape
    shape = (rows, k.shape[1], spec.key_dim, spec.state_width)
    gates = (decay, beta, erase, add, bonus)
    if tuple(state.shape) != shape or tuple(out.shape) != (rows, heads, tokens, spec.value_dim):
        raise ValueError(f"the state of this step is {shape}, its output {(*q.shape[:3], '...')}")
    if any(t.dtype != v.dtype for t in (q, k, out)) or any(
        t is not None and t.dtype != torch.float32 for t in (*gates, state)
    ):
        raise ValueError("q, k, v and out share a dtype; gates and state are float32")
    held = [t for t in (q, k, v, *gates, state, out) if t is not None]
    if not all(t.is_contiguous() for t in held):
        raise ValueError("the buffers of a fixed step are contiguous")
    address = [0 if t is None else t.data_ptr() for t in (q, k, v, *gates, state, state, out)]
    large = state.numel() >= PARALLEL
    packed = _PACK(
        *address, 0, heads, k.shape[1], tokens, rows, torch.get_num_threads() if large else 1
    )
    step = partial(kernel, packed)
    step.__dict__["buffers"] = held  # they live as long as the step
    return step


def _kernel(spec: Recurrence, dtype: torch.dtype, target: Target) -> Any | NoKernel:
    library = load(step_unit(spec, dtype, target))
    if isinstance(library, NoKernel):
        return library
    kernel = library.recurrence_step
    kernel.argtypes, kernel.restype = (ctypes.c_char_p,), None
    return kernel


@lru_cache(maxsize=256)
def stepper(spec: Recurrence, dtype: torch.dtype) -> Step | NoKernel:
    """The step kernel of a causal spec, bound.

    It is called with q, k, v of `dtype`, then decay, beta, erase, add, bonus, start (float32) and
    cu_seqlens (int32), None where the spec has no such input, and returns the outputs and the end
    state as `recurrence.forward` does. It has no limit on the number of tokens. With `reuse` the
    end state is written over `start`.
    """
    target = host_target()
    if isinstance(target, str):
        return NoKernel(target)
    kernel = _kernel(spec, dtype, target)
    if isinstance(kernel, NoKernel):
        return kernel
    key_dim, value_dim, width = spec.key_dim, spec.value_dim, spec.state_width
    empty, float32, threads_of = torch.empty, torch.float32, torch.get_num_threads

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        beta: Tensor | None = None,
        erase: Tensor | None = None,
        add: Tensor | None = None,
        bonus: Tensor | None = None,
        start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        rows, heads, tokens, _ = q.shape
        kv_heads = k.shape[1]
        if cu_seqlens is not None:
            rows = cu_seqlens.shape[0] - 1
        if decay is not None:
            decay = decay.contiguous()
        if beta is not None:
            beta = beta.contiguous()
        if erase is not None and add is not None:
            erase, add = erase.contiguous(), add.contiguous()
        if start is not None:
            start = start.contiguous()
        out = empty((q.shape[0], heads, tokens, value_dim), dtype=dtype)
        if reuse and start is not None:
            end = start
        else:
            end = empty((rows, kv_heads, key_dim, width), dtype=float32)
        large = rows * kv_heads * key_dim * width >= PARALLEL
        kernel(
            _PACK(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                0 if decay is None else decay.data_ptr(),
                0 if beta is None else beta.data_ptr(),
                0 if erase is None else erase.data_ptr(),
                0 if add is None else add.data_ptr(),
                0 if bonus is None else bonus.data_ptr(),
                0 if start is None else start.data_ptr(),
                end.data_ptr(),
                out.data_ptr(),
                0 if cu_seqlens is None else cu_seqlens.data_ptr(),
                heads,
                kv_heads,
                tokens,
                rows,
                threads_of() if large else 1,
            )
        )
        return out, end

    return run
