"""The operator `attention_rewriter::block_sparse` with its backward, fake and vmap rules."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs
from rewriter.backends.ops.choice import raw
from rewriter.backends.ops.codec import decode
from rewriter.backends.ops.gradients import gradients_of
from rewriter.backends.ops.mapping import fold_batch
from rewriter.backends.reference.block_sparse import block_sparse as reference
from rewriter.ir.block_sparse import BlockSparse

NAMES = (
    *("q", "k", "v", "sinks", "slopes", "bias", "temperature"),
    *("key_lengths", "cu_seqlens", "blocks"),
)
_UNBATCHED = frozenset({"sinks", "slopes", "temperature", "cu_seqlens"})


@torch.library.custom_op("attention_rewriter::block_sparse", mutates_args=())
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    blocks: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, M, Dv) in the dtype of v and log-sum-exps (B, H, M) float32, contiguous.

    No gradient flows through the log-sum-exp.

    Args: as `BlockSparseInputs`; `spec` from `codec.encode`; `backend` a name of `choice`.
    """
    kind = cast(BlockSparse, decode(spec))
    x = BlockSparseInputs(
        q, k, v, sinks, slopes, bias, temperature, key_lengths, cu_seqlens, blocks
    )
    kernels = raw(backend, "block_sparse")
    out, lse = _reference(kind, x) if kernels is None else kernels.forward(kind, x)
    return out.contiguous(), lse.contiguous()


@block_sparse.register_fake
def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shapes of the outputs and log-sum-exps of every operator that attends."""
    B, H, M, _ = q.shape
    return v.new_empty((B, H, M, v.shape[-1])), v.new_empty((B, H, M), dtype=torch.float32)


@torch.library.custom_op("attention_rewriter::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    blocks: Tensor | None,
    spec: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of the floating inputs that are given, in their order, contiguous."""
    kind = cast(BlockSparse, decode(spec))
    x = BlockSparseInputs(
        q, k, v, sinks, slopes, bias, temperature, key_lengths, cu_seqlens, blocks
    )
    kernels = raw(backend, "block_sparse")
    if kernels is None or kernels.decline(kind, v.dtype, True) is not None:
        return gradients_of(lambda y: _reference(kind, y), x, (grad_out, None))
    grads = kernels.backward(kind, x, out, lse, grad_out)
    given = [n for n in NAMES if hasattr(grads, n) and getattr(x, n) is not None]
    return [getattr(grads, n).to(getattr(x, n).dtype).contiguous() for n in given]


@block_sparse_backward.register_fake
def _fake_backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grads = iter(block_sparse_backward(grad_out, out, lse, *tensors, ctx.spec, ctx.backend))
    floating = (t is not None and t.is_floating_point() for t in tensors)
    return (*(next(grads) if f else None for f in floating), None, None)


block_sparse.register_autograd(_backward, setup_context=_setup)


@block_sparse.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """A mapped axis joins the batch; what has no batch axis must not be mapped."""
    bias = args[NAMES.index("bias")]
    if bias is not None and in_dims[NAMES.index("bias")] is None and bias.shape[0] == 1:
        shared = _UNBATCHED | {"bias"}
    else:
        shared = _UNBATCHED
    folded = fold_batch("block_sparse", info.batch_size, in_dims, args, NAMES, shared)
    out, lse = block_sparse(*folded)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in (out, lse)), (0, 0)


def _reference(spec: BlockSparse, x: BlockSparseInputs) -> tuple[Tensor, Tensor]:
    return reference(
        spec,
        x.q,
        x.k,
        x.v,
        sinks=x.sinks,
        slopes=x.slopes,
        bias=x.bias,
        temperature=x.temperature,
        key_lengths=x.key_lengths,
        cu_seqlens=x.cu_seqlens,
        blocks=x.blocks,
    )
