"""The operator `attention_rewriter::padded_block_sparse`: which keys are padding, a call says.

A graph that is compiled once serves batches without padding, with padding on the right and on the
left; only the call sees which it is. Without padding it is `block_sparse`, padding on the right
becomes key lengths, anything else a bias that hides the padded keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from rewriter.backends.ops.block_sparse import block_sparse, block_sparse_backward, fake_forward
from rewriter.backends.ops.codec import decode, encode
from rewriter.backends.ops.mapping import fold_batch
from rewriter.ir.block_sparse import BlockSparse

_HIDDEN = -1e30  # exp of its distance to any score is 0 in float32


@torch.library.custom_op("attention_rewriter::padded_block_sparse", mutates_args=())
def padded_block_sparse(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, spec: str, backend: str
) -> tuple[Tensor, Tensor]:
    """As `block_sparse` over the keys that are valid; 0 and -inf where a row sees none.

    Args:
        q, k, v: (B, H, M, Dk), (B, Hkv, N, Dk), (B, Hkv, N, Dv).
        valid: (B, N) bool, False at padding.
        spec: a `BlockSparse` without further inputs, from `codec.encode`.
        backend: a name of `choice`.

    Returns:
        (B, H, M, Dv) in the dtype of v and the log-sum-exps (B, H, M) float32, contiguous.
    """
    text, bias, lengths = _form(spec, q, k, valid)
    out, lse = block_sparse(q, k, v, None, None, bias, None, lengths, None, None, text, backend)
    if bias is None:
        return out, lse
    dead = lse < _HIDDEN / 2
    return out.masked_fill(dead[..., None], 0), lse.masked_fill(dead, -torch.inf)


padded_block_sparse.register_fake(fake_forward)


@torch.library.custom_op("attention_rewriter::padded_block_sparse_backward", mutates_args=())
def padded_block_sparse_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    text, bias, lengths = _form(spec, q, k, valid)
    if bias is not None:  # weights of a row that saw nothing are exp(hidden - inf) = 0
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    hooks = (None, None, bias, None, lengths, None, None)
    dq, dk, dv, *_ = block_sparse_backward(grad_out, out, lse, q, k, v, *hooks, text, backend)
    return dq, dk, dv


@padded_block_sparse_backward.register_fake
def _fake_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _form(
    spec: str, q: Tensor, k: Tensor, valid: Tensor
) -> tuple[str, Tensor | None, Tensor | None]:
    """(spec, bias, key lengths) of the `block_sparse` call that serves this padding."""
    if bool(valid.all()):
        return spec, None, None
    lengths = valid.sum(-1, dtype=torch.int32)
    steps = torch.arange(valid.shape[1], device=valid.device)
    if bool((valid == (steps < lengths[:, None])).all()):
        return spec, None, lengths
    kind = replace(cast(BlockSparse, decode(spec)), bias=True)
    bias = torch.where(valid, 0.0, _HIDDEN)[:, None, None, :]
    return encode(kind), bias.expand(q.shape[0], 1, q.shape[2], k.shape[2]), None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grads = padded_block_sparse_backward(grad_out, out, lse, *tensors, ctx.spec, ctx.backend)
    return (*grads, None, None, None)


padded_block_sparse.register_autograd(_backward, setup_context=_setup)


@padded_block_sparse.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """A mapped axis joins the batch."""
    names = ("q", "k", "v", "valid")
    folded = fold_batch("padded_block_sparse", info.batch_size, in_dims, args, names, ())
    out, lse = padded_block_sparse(*folded)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in (out, lse)), (0, 0)
