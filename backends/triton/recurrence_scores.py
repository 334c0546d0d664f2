"""Scores inside a chunk where every key channel decays on its own (GLA, KDA, RWKV-6)."""

from __future__ import annotations

from torch import Tensor

from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_forward import Call, Sums
from rewriter.backends.triton.targets import CHUNK


def channel_scores(call: Call, left: Tensor, reach: Tensor, sums: Sums, strict: bool) -> Tensor:
    """(B, heads of `left`, N, CHUNK) float32: row t holds the scores of the keys of its chunk.

    Args:
        left: queries, or keys for the products of a delta rule.
        reach: decay sums of the rows.
        strict: only keys before the row.
    """
    size, k = call.size, call.x.k
    heads = left.shape[1]
    out = call.float32(size.batch, heads, size.length, CHUNK)
    module = emit("recurrence_scores", strict=strict, packed=call.packed, precision=call.precision)
    chosen = call.config("scores")
    call.run(
        Launch(
            module.scores,
            (size.slots, CHUNK // 16, size.batch * heads),
            {
                "left": left,
                "k": k,
                "reach": reach,
                "written": sums.written,
                "out": out,
                **size.chunk_args(),
                **strides("left", left),
                **strides("k", k),
                "heads": heads,
                "group": heads // size.kv_heads,
                "length": size.length,
            },
            {"DK": call.spec.key_dim, "C": CHUNK, "BK": block(call.spec.key_dim, chosen.keys)},
            chosen.warps,
            chosen.stages,
        )
    )
    return out


def query_scores(call: Call, sums: Sums | None) -> Tensor | None:
    """Scores of the queries, or None where they factor."""
    if call.spec.decay != "channel" or sums is None:
        return None
    return channel_scores(call, call.x.q, sums.reach, sums, call.exclusive)
