"""Generated kernels behind the signatures of the reference: padding, states and windows folded in.

`kernel` and `refusal` are what a generated backend gives the registry. The tensors reach the
raw kernels through the custom operators, so autograd, tracing and compilation work everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs, DecodeInputs, RecurrenceInputs
from rewriter.backends.ops.attend import decode as decode_op
from rewriter.backends.ops.block_sparse import block_sparse as block_sparse_op
from rewriter.backends.ops.choice import GENERATED, Family, raw
from rewriter.backends.ops.codec import Spec, encode
from rewriter.backends.ops.codec import decode as decode_text
from rewriter.backends.ops.eager import unwatched
from rewriter.backends.ops.recurrence import recurrence as recurrence_op
from rewriter.backends.reference.near import Context, context_of, next_state
from rewriter.backends.reference.sinks import gather_sinks
from rewriter.backends.reference.window import window_attention
from rewriter.ir.block_sparse import CAUSAL, BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.kernels import KernelSpec, WindowAttention
from rewriter.ir.mask import I, J
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import State

if TYPE_CHECKING:
    from rewriter.backends.registry import Query


def kernel(backend: str, spec: KernelSpec) -> Callable[..., Any]:
    """The kernel of a spec on a generated backend, its spec bound."""
    if isinstance(spec, Recurrence):
        return partial(_recurrence, backend, spec, _text(spec), _text(_per_token(spec)))
    if isinstance(spec, BlockSparse):
        return partial(_block_sparse, backend, spec, _text(spec))
    if isinstance(spec, Decode):
        return partial(_decode, backend, spec, _text(spec))
    if isinstance(spec, WindowAttention):
        return partial(_window, backend, spec)
    raise TypeError(f"no generated kernel for {type(spec).__name__}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _text(spec: Spec) -> str:
    """The spec as text; a constant of a graph that is being compiled."""
    return encode(spec)


def refusal(backend: str, spec: KernelSpec, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why a generated backend cannot serve a spec, as one sentence, or None if it can."""
    if isinstance(spec, Recurrence):
        return _declines(backend, "recurrence", spec, dtype, needs_grad)
    if isinstance(spec, BlockSparse):
        return _declines(backend, "block_sparse", spec, dtype, needs_grad)
    if isinstance(spec, Decode):
        return _declines(backend, "decode", spec, dtype, needs_grad)
    if isinstance(spec, WindowAttention):
        # Its widths are known at the call only, where a width that does not fit falls back.
        form = lowered(spec, 64, 64)
        if isinstance(form, str):
            return form
        return _declines(backend, "block_sparse", form, dtype, needs_grad)
    return f"it has no kernel for {type(spec).__name__}"


@lru_cache(maxsize=1024)
def _declines(
    backend: str, family: Family, spec: Spec, dtype: torch.dtype, needs_grad: bool
) -> str | None:
    reason: str | None = _raw(backend, family).decline(spec, dtype, needs_grad)
    return reason


def _raw(backend: str, family: Family) -> Any:
    kernels = raw(backend, family)
    assert kernels is not None, "the reference has no raw kernels"
    return kernels


def _recurrence(
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

    `text` and `padded` are the spec as text, without and with padding.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    if valid is not None:
        pad = ~valid[:, None, :]
        k, v = k.masked_fill(pad[..., None], 0), v.masked_fill(pad[..., None], 0)
        q = q.masked_fill(pad[..., None], 0)
        if spec.decay == "head" and decay is not None:
            # A constant decay that stops at padding is a decay per token.
            decay = decay[None, :, None].expand(k.shape[0], -1, k.shape[2])
            text, spec = padded, _per_token(spec)
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
        x = RecurrenceInputs(q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start)
        out, end = _raw(backend, "recurrence").forward(spec, x)
        return out, None if state is None else {"S": end}
    out, end = recurrence_op(
        q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start, text, backend
    )
    return out, None if state is None else {"S": end}


def _per_token(spec: Recurrence) -> Recurrence:
    return replace(spec, decay="token") if spec.decay == "head" else spec


def _block_sparse(
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
        out, lse = _raw(backend, "block_sparse").forward(spec, x)
        return out, lse
    out, lse = block_sparse_op(q, k, v, *hooks, key_lengths, cu_seqlens, blocks, text, backend)
    return out, lse


def _decode(
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
        out, lse = _raw(backend, "decode").forward(spec, x)
        return out, lse
    out, lse = decode_op(q, k, v, lengths, pages, index, sinks, text, backend)
    return out, lse


@lru_cache(maxsize=256)
def lowered(spec: WindowAttention, key_dim: int, value_dim: int) -> BlockSparse | str:
    """The block-sparse form of a window over a sequence that starts here, or why there is none."""
    if spec.hidden:
        return "a window with a branch switched off has no block-sparse form"
    seen = _within(spec.window, spec.causal)
    if spec.sinks:
        seen = sympy.Or(seen, sympy.Lt(J, spec.sinks))
    if spec.limit is not None:
        seen = sympy.And(seen, _within(spec.limit, spec.causal))
    mask = sympy.And(CAUSAL, seen) if spec.causal else seen
    return BlockSparse(key_dim, value_dim, spec.scale, mask, spec.softcap)


def _within(size: int, causal: bool) -> Boolean:
    before = sympy.Lt(I - J, size)
    return before if causal else sympy.And(before, sympy.Lt(J - I, size))


def _window(
    backend: str,
    spec: WindowAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """A whole sequence without padding runs generated; the rest is the reference's."""
    n = q.shape[-2]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    whole = n > 1 and valid is None and bias is None and (state is None or _fresh(state))
    text = _window_text(backend, spec, q.shape[-1], v.shape[-1], v.dtype, grad) if whole else None
    if text is None:
        return window_attention(spec, q, k, v, valid=valid, bias=bias, state=state)
    form = decode_text(text)
    assert isinstance(form, BlockSparse)
    out, _ = _block_sparse(backend, form, text, q, k, v)
    if state is None:
        return out, None
    context = Context(
        *context_of(spec, k, v, None, state), gather_sinks(spec.sinks, k, v, None, state)
    )
    return out, next_state(spec, context, state, n)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _window_text(
    backend: str,
    spec: WindowAttention,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    needs_grad: bool,
) -> str | None:
    """The block-sparse form as text, or None where the backend does not serve it."""
    form = lowered(spec, key_dim, value_dim)
    if isinstance(form, str) or _declines(backend, "block_sparse", form, dtype, needs_grad):
        return None
    return encode(form)


def _fresh(state: State) -> bool:
    """Whether no token was seen; unknown while a graph is traced, hence no."""
    if torch.compiler.is_compiling():
        return False
    return not bool(state["seen"].any())


@dataclass(frozen=True)
class GeneratedBackend:
    """A backend whose kernels are generated for a spec the first time it is used.

    Attributes:
        name: a name of `ops.choice.GENERATED`.
        device: device type it makes code for.
        priority: higher is asked first.
    """

    name: str
    device: str
    priority: int

    def decline(self, query: Query) -> str | None:
        if query.device != self.device:
            return f"it makes code for {self.device} devices, not for {query.device}"
        return refusal(self.name, query.spec, query.dtype, query.needs_grad)

    def kernel(self, query: Query) -> Callable[..., Any]:
        return kernel(self.name, query.spec)
