"""Tile sizes, lists and the arguments that all block-sparse kernels share."""

from __future__ import annotations

import torch

from rewriter.backends.triton.attention_call import Args, AttentionCall
from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.targets import Config, config


def tile_of(call: AttentionCall, kernel: str) -> Config:
    """Tile sizes; a run-time block is a whole number of tiles."""
    spec = call.spec
    kernel = "listed_keys" if call.listed and kernel == "attend_keys" else kernel
    four = call.x.v.dtype == torch.float32
    chosen = config(kernel, call.target, max(spec.key_dim, spec.value_dim), four)
    if not call.listed:
        return chosen
    size = spec.block
    return Config(
        min(chosen.rows, size), min(chosen.keys, size), chosen.values, chosen.warps, chosen.stages
    )


def visited(call: AttentionCall, chosen: Config, transposed: bool = False) -> Args:
    """The lists of key blocks (transposed: of query blocks) by parameter name."""
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
    lists = call.lists(chosen.rows, chosen.keys, transposed)._asdict()
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
