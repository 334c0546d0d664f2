"""The raw block-sparse attention kernels of the Triton backend; interface: `backends/inputs.py`.

Not yet timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseGrads, BlockSparseInputs
from rewriter.backends.triton.attention_call import AttentionCall
from rewriter.backends.triton.attention_tiles import common, sizes, tile_of, visited
from rewriter.backends.triton.block_sparse_backward import gradients
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch, Runner, execute, unavailable
from rewriter.backends.triton.predicate import printed
from rewriter.backends.triton.targets import DTYPES, Target, target_of
from rewriter.ir.block_sparse import BlockSparse


def decline(spec: BlockSparse, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why these kernels cannot serve a spec, or None if they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not {dtype}"
    if max(spec.key_dim, spec.value_dim) > 256:
        return "head dims above 256 do not fit the registers of one program"
    if spec.block and (spec.block < 16 or spec.block & (spec.block - 1)):
        return f"run-time blocks of {spec.block} are not a power of two of at least 16"
    try:
        printed(spec.mask)
    except ValueError as error:
        return str(error)
    return None


def forward(
    spec: BlockSparse, x: BlockSparseInputs, run: Runner = execute, target: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, M, Dv) in the dtype of v and the log-sum-exp (B, H, M), float32.

    Args:
        run, target: replaced to compile for a GPU that is not there.
    """
    call = AttentionCall.of(spec, x, run, target or target_of(x.q.device))
    x = call.x
    B, H, M, _ = x.q.shape
    out = x.v.new_empty((B, H, M, spec.value_dim))
    lse = x.v.new_empty((B, H, M), dtype=torch.float32)
    chosen = tile_of(call, "attend")
    features = call.features()
    run(
        Launch(
            emit("block_sparse_forward", f=features).attend,
            (-(-M // chosen.rows), B * H),
            {
                "q": x.q,
                "k": x.k,
                "v": x.v,
                "out": out,
                "lse": lse,
                **({} if x.sinks is None else {"sinks": x.sinks.contiguous()}),
                **call.hooks(),
                **visited(call, chosen),
                **common(call),
            },
            sizes(call, chosen),
            chosen.warps,
            chosen.stages,
        )
    )
    return out, lse


def backward(
    spec: BlockSparse,
    x: BlockSparseInputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    run: Runner = execute,
    target: Target | None = None,
) -> BlockSparseGrads:
    """Gradients of the inputs that were given; see `forward`."""
    call = AttentionCall.of(spec, x, run, target or target_of(x.q.device))
    return gradients(call, out, lse, grad_out)
