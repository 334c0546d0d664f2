"""The operator `attention_rewriter::recurrence` with its backward, fake and vmap rules."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.ops.choice import raw
from rewriter.backends.ops.codec import decode
from rewriter.backends.ops.gradients import gradients_of
from rewriter.backends.ops.mapping import fold_batch
from rewriter.backends.reference.recurrence.kernel import recurrence as reference
from rewriter.ir.recurrence import Recurrence

NAMES = ("q", "k", "v", "decay", "beta", "erase", "add", "bonus", "cu_seqlens", "start")


@torch.library.custom_op("attention_rewriter::recurrence", mutates_args=())
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    erase: Tensor | None,
    add: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in the dtype of v and the end state, float32, both contiguous.

    Args: as `RecurrenceInputs`; `spec` from `codec.encode`; `backend` a name of `choice`.
    """
    kind = cast(Recurrence, decode(spec))
    x = RecurrenceInputs(q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start)
    kernels = raw(backend, "recurrence")
    if kernels is None:
        return _reference(kind, x)
    out, end = kernels.forward(kind, x)
    return out.contiguous(), end.contiguous()


@recurrence.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    erase: Tensor | None,
    add: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kind = cast(Recurrence, decode(spec))
    B, H, N, _ = q.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (rows, k.shape[1], kind.key_dim, kind.state_width)
    return v.new_empty((B, H, N, kind.value_dim)), v.new_empty(state, dtype=torch.float32)


@torch.library.custom_op("attention_rewriter::recurrence_backward", mutates_args=())
def recurrence_backward(
    grad_out: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    erase: Tensor | None,
    add: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
    spec: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of the floating inputs that are given, in their order, contiguous."""
    kind = cast(Recurrence, decode(spec))
    x = RecurrenceInputs(q, k, v, decay, beta, erase, add, bonus, cu_seqlens, start)
    kernels = raw(backend, "recurrence")
    if kernels is None or kernels.decline(kind, v.dtype, True) is not None:
        return gradients_of(lambda y: _reference(kind, y), x, (grad_out, grad_end))
    grads = kernels.backward(kind, x, grad_out, grad_end)
    given = [n for n in NAMES if n != "cu_seqlens" and getattr(x, n) is not None]
    return [getattr(grads, n).to(getattr(x, n).dtype).contiguous() for n in given]


@recurrence_backward.register_fake
def _fake_backward(grad_out: Tensor, grad_end: Tensor, *args: Any) -> list[Tensor]:
    given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = iter(recurrence_backward(grad_out, grad_end, *tensors, ctx.spec, ctx.backend))
    floating = (t is not None and t.is_floating_point() for t in tensors)
    return (*(next(grads) if f else None for f in floating), None, None)


recurrence.register_autograd(_backward, setup_context=_setup)


@recurrence.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """A mapped axis joins the batch; what has no batch axis must not be mapped."""
    shared = {"bonus", "cu_seqlens"}
    if cast(Recurrence, decode(args[NAMES.index("start") + 1])).decay == "head":
        shared.add("decay")
    out, end = recurrence(*fold_batch("recurrence", info.batch_size, in_dims, args, NAMES, shared))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in (out, end)), (0, 0)


def _reference(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    rows = x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    start = x.start
    if start is None:
        width = (rows, x.k.shape[1], spec.key_dim, spec.state_width)
        start = x.v.new_zeros(width, dtype=torch.float32)
    out, state = reference(
        spec,
        x.q,
        x.k,
        x.v,
        decay=x.decay,
        beta=x.beta,
        erase=x.erase,
        add=x.add,
        bonus=x.bonus,
        cu_seqlens=x.cu_seqlens,
        state={"S": start} if spec.causal else None,
    )
    end = start.clone() if state is None else state["S"]
    return out.contiguous(), end.contiguous()
