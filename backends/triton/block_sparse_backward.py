"""Gradients of block-sparse attention: one kernel over query blocks, one over key blocks.

Weights are computed again from the log-sum-exp; nothing of size M x N is kept. Sums over a shared
bias are atomic and so not the same bit for bit from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseGrads
from rewriter.backends.triton.attention_call import Args, AttentionCall, bias_strides
from rewriter.backends.triton.attention_tiles import common, sizes, tile_of, visited
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch


def gradients(call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor) -> BlockSparseGrads:
    """Gradients of every input of a call, each of its input's shape.

    Args:
        out, lse: what the forward pass returned.
        grad_out: (B, H, M, Dv).
    """
    x = call.x
    soft = call.spec.weight == "softmax"
    grad = grad_out.to(x.v.dtype).contiguous()
    dots = (grad.float() * out.float()).sum(-1)
    args: Args = {"q": x.q, "k": x.k, "v": x.v, "grad": grad}
    if soft:
        args.update({"lse": lse.contiguous(), "dots": dots})
    grad_q, hooks = _queries(call, args)
    grad_k, grad_v = _keys(call, args)
    sinks = None
    if x.sinks is not None:
        # A sink takes part in the sum alone: its weight times minus the row's mean gradient.
        weight = torch.exp(x.sinks.float()[:, None] - lse)
        sinks = -(torch.where(lse == -torch.inf, 0.0, weight) * dots).sum((0, 2))
    return BlockSparseGrads(
        grad_q,
        grad_k,
        grad_v,
        sinks,
        hooks.get("slopes"),
        hooks.get("bias"),
        hooks.get("temperature"),
    )


def _queries(call: AttentionCall, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    x = call.x
    B, H, M, _ = x.q.shape
    chosen = tile_of(call, "attend_queries")
    features = call.features(backward=True)
    module = emit("block_sparse_backward", f=features)
    grad_q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
    extra: Args = {}
    if x.slopes is not None:
        extra["grad_slopes"] = x.v.new_empty((B, H, M), dtype=torch.float32)
    if x.temperature is not None:
        extra["grad_temperature"] = x.v.new_empty((B, H, M), dtype=torch.float32)
    if x.bias is not None:
        made = x.bias.new_zeros(x.bias.shape, dtype=torch.float32)
        places = {f"grad_{n}": s for n, s in bias_strides(made).items() if n != "bias_n"}
        extra.update({"grad_bias": made, **places})
    call.run(
        Launch(
            module.queries,
            (-(-M // chosen.rows), B * H),
            {
                **args,
                "grad_q": grad_q,
                **extra,
                **call.hooks(),
                **visited(call, chosen),
                **common(call),
            },
            sizes(call, chosen),
            chosen.warps,
            chosen.stages,
            repeatable=not features.shared_bias,
        )
    )
    hooks = {n.removeprefix("grad_"): t for n, t in extra.items() if isinstance(t, Tensor)}
    if "slopes" in hooks:
        hooks["slopes"] = hooks["slopes"].sum((0, 2))
    if "temperature" in hooks:
        hooks["temperature"] = hooks["temperature"].sum(0)
    return grad_q, hooks


def _keys(call: AttentionCall, args: Args) -> tuple[Tensor, Tensor]:
    x = call.x
    N = x.k.shape[2]
    chosen = tile_of(call, "attend_keys")
    module = emit("block_sparse_backward", f=call.features(backward=True))
    grad_k = torch.empty_like(x.k, memory_format=torch.contiguous_format)
    grad_v = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    where = {"member": _members(call)} if call.listed else visited(call, chosen, transposed=True)
    call.run(
        Launch(
            module.keys,
            (-(-N // chosen.keys), x.k.shape[0] * x.k.shape[1]),
            {
                **args,
                "grad_k": grad_k,
                "grad_v": grad_v,
                **call.hooks(),
                **where,
                **common(call),
            },
            sizes(call, chosen),
            chosen.warps,
            chosen.stages,
        )
    )
    return grad_k, grad_v


def _members(call: AttentionCall) -> Tensor:
    """(B, Hkv, query blocks, key blocks) uint8: whether a run-time list names the key block."""
    blocks = call.x.blocks
    assert blocks is not None
    count = -(-call.x.k.shape[2] // call.spec.block)
    # The -1 at the end of a list goes into a column that is cut off again.
    slot = torch.where(blocks >= 0, blocks, count).long()
    out = torch.zeros((*blocks.shape[:3], count + 1), dtype=torch.uint8, device=blocks.device)
    return out.scatter(-1, slot, 1)[..., :count].contiguous()
