"""The raw block-sparse attention kernels of the Triton backend; interface: `backends/inputs.py`.

Not yet timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs
from rewriter.backends.triton.attention_call import Args, AttentionCall
from rewriter.backends.triton.chunks import strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch, Runner, execute, unavailable
from rewriter.backends.triton.predicate import printed
from rewriter.backends.triton.recurrence_forward import block
from rewriter.backends.triton.targets import DTYPES, Config, Target, config, target_of
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


def tile_of(call: AttentionCall, kernel: str) -> Config:
    """Tile sizes; a run-time block is a whole number of tiles."""
    spec = call.spec
    four = call.x.v.dtype == torch.float32
    chosen = config(kernel, call.target, max(spec.key_dim, spec.value_dim), four)
    if not call.listed:
        return chosen
    size = spec.block
    return Config(
        min(chosen.rows, size), min(chosen.keys, size), chosen.values, chosen.warps, chosen.stages
    )


def visited(call: AttentionCall, chosen: Config) -> Args:
    """The lists of key blocks by parameter name."""
    blocks = call.x.blocks
    if blocks is not None:
        blocks = blocks.to(torch.int32).contiguous()
        return {
            "listed": blocks,
            "counts": (blocks >= 0).sum(-1, dtype=torch.int32),
            "list_b": blocks.stride(0),
            "list_h": blocks.stride(1),
            "list_r": blocks.stride(2),
        }
    lists = call.lists(chosen.rows, chosen.keys)._asdict()
    if not call.features().unmasked:
        del lists["full_starts"], lists["full_blocks"]
    return lists


def common(call: AttentionCall) -> Args:
    """Strides and sizes that every kernel takes."""
    x = call.x
    q = strides("q", x.q)
    return {
        **{("q_m" if name == "q_n" else name): s for name, s in q.items()},
        **strides("k", x.k),
        **strides("v", x.v),
        "heads": x.q.shape[1],
        "group": x.q.shape[1] // x.k.shape[1],
        "M": x.q.shape[2],
        "N": x.k.shape[2],
        "offset": call.spec.offset,
        "scale": call.spec.scale,
    }


def sizes(call: AttentionCall, chosen: Config) -> dict[str, int | float]:
    """Compile-time sizes that every kernel takes."""
    spec = call.spec
    return {
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "BD": block(spec.key_dim, 256),
        "BE": block(spec.value_dim, 256),
        "BM": chosen.rows,
        "BN": chosen.keys,
        **({"BLOCK": spec.block} if call.listed else {}),
    }
