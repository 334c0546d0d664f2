"""Calls of one generated kernel: padding folded in, through the operators or straight.

Watched calls (autograd, tracing, vmap) go through the custom operators; the others call the raw
kernel, since dispatching an operator costs more than a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs, DecodeInputs, RecurrenceInputs
from rewriter.backends.ops.attend import decode as decode_op
from rewriter.backends.ops.block_sparse import block_sparse as block_sparse_op
from rewriter.backends.ops.choice import GENERATED, Family, raw
from rewriter.backends.ops.codec import Spec, encode
from rewriter.backends.ops.eager import unwatched
from rewriter.backends.ops.recurrence import recurrence as recurrence_op
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import Owned, State


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def text_of(spec: Spec) -> str:
    """The spec as text; a constant of a graph that is being compiled."""
    return encode(spec)


@lru_cache(maxsize=1024)
def declines(
    backend: str, family: Family, spec: Spec, dtype: torch.dtype, needs_grad: bool
) -> str | None:
    reason: str | None = raw_kernels(backend, family).decline(spec, dtype, needs_grad)
    return reason


def raw_kernels(backend: str, family: Family) -> Any:
    kernels = raw(backend, family)
    assert kernels is not None, "the reference has no raw kernels"
    return kernels


@lru_cache(maxsize=256)
def bound_step(backend: str, spec: Recurrence, dtype: torch.dtype) -> Callable[..., Any] | None:
    """A step kernel without the cost of a general call, where the backend has one."""
    make = getattr(raw_kernels(backend, "recurrence"), "stepper", None)
    step = make(spec, dtype) if make is not None and spec.causal else None
    return step if callable(step) else None


def recurrence(
    backend: str,
    spec: Recurrence,
    text: str,
    padded: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    add: Tensor | None = None,
    bonus: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """As the reference's `recurrence`; a padded token is made one that changes nothing.

    Where the backend has a bound step, a step writes an `Owned` state in place. `text` and `padded`
    are the spec as text, without and with padding.
    """
    if q.dtype != v.dtype or k.dtype != v.dtype:
        q, k = q.to(v.dtype), k.to(v.dtype)
    if valid is not None:
        pad = ~valid[:, None, :]
        k, v = k.masked_fill(pad[..., None], 0), v.masked_fill(pad[..., None], 0)
        q = q.masked_fill(pad[..., None], 0)
        if spec.decay == "head" and decay is not None:
            # A constant decay that stops at padding is a decay per token.
            decay = decay[None, :, None].expand(k.shape[0], -1, k.shape[2])
            text, spec = padded, per_token(spec)
        if decay is not None:
            decay = decay.masked_fill(pad[..., None] if decay.dim() == 4 else pad, 0)
        if beta is not None:
            beta = beta.masked_fill(pad, 0)
        if erase is not None:
            erase = erase.masked_fill(pad[..., None], 0)
        if add is not None:
            add = add.masked_fill(pad[..., None], 0)
    start = None if state is None else state["S"]
    if backend in GENERATED and unwatched(q, k, v, decay, beta, erase, add, bonus, start):
        step = bound_step(backend, spec, v.dtype) if q.shape[2] == 1 else None
        if step is not None and all(
            t is None or t.dtype == torch.float32 for t in (decay, beta, erase, add, bonus, start)
        ):
            reuse = isinstance(state, Owned)
            out, end = step(q, k, v, decay, beta, erase, add, bonus, start, cu_seqlens, reuse)
            return out, None if state is None else {"S": end}
        x = RecurrenceInputs(q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start)
        out, end = raw_kernels(backend, "recurrence").forward(spec, x)
        return out, None if state is None else {"S": end}
    out, end = recurrence_op(
        q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start, text, backend
    )
    return out, None if state is None else {"S": end}


def per_token(spec: Recurrence) -> Recurrence:
    return replace(spec, decay="token") if spec.decay == "head" else spec


def block_sparse(
    backend: str,
    spec: BlockSparse,
    text: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's `block_sparse`."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    hooks = (sinks, slopes, bias, temperature)
    if backend in GENERATED and unwatched(q, k, v, *hooks):
        x = BlockSparseInputs(q, k, v, *hooks, key_lengths, cu_seqlens, blocks)
        out, lse = raw_kernels(backend, "block_sparse").forward(spec, x)
        return out, lse
    out, lse = block_sparse_op(q, k, v, *hooks, key_lengths, cu_seqlens, blocks, text, backend)
    return out, lse


def decode(
    backend: str,
    spec: Decode,
    text: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    index: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's `decode`."""
    q = q.to(v.dtype)
    if backend in GENERATED and unwatched(q, k, v, sinks):
        x = DecodeInputs(q, k, v, lengths, pages, index, sinks)
        out, lse = raw_kernels(backend, "decode").forward(spec, x)
        return out, lse
    out, lse = decode_op(q, k, v, lengths, pages, index, sinks, text, backend)
    return out, lse
