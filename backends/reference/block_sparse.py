"""Reference kernel of `BlockSparse`: softmax or sigmoid weights over the scheduled keys.

Query blocks are served one after the other, each against the key blocks of its row in the schedule,
so the largest temporary is the scores of one query block. For long sequences the scores are
computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewriter.backends.reference.normal import softmax
from rewriter.backends.reference.precision import full_precision, wide
from rewriter.backends.schedule import schedule, work
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.mask import evaluate
from rewriter.ir.predicate import lower

_ROWS, _KEYS = 128, 64
# Above this many pairs of one head the scores are not kept for the backward pass.
_KEEP_PAIRS = 1 << 22


@dataclass(frozen=True)
class _Call:
    """What all query blocks share."""

    spec: BlockSparse
    sinks: Tensor | None
    slopes: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None


def block_sparse(
    spec: BlockSparse,
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
    """Attend over the keys the predicate allows.

    Args:
        spec: what to compute.
        q, k, v: (B, H, M, Dk), (B, Hkv, N, Dk), (B, Hkv, N, Dv).
        sinks, slopes: (H,). bias: (1|B, 1|H, M, N). temperature: (H, M).
        key_lengths: (B,). cu_seqlens: (S + 1,).
        blocks: (B, Hkv, ceil(M / spec.block), L) key block numbers, -1 at the end.

    Returns:
        (B, H, M, Dv) in the dtype of v and the log-sum-exp (B, H, M), float32 (float64 for float64
        inputs). A row that sees nothing gives 0 and -inf, with finite gradients.

    Raises:
        ValueError: the predicate cannot be evaluated on a tile.
    """
    H, M, N = q.shape[1], q.shape[2], k.shape[2]
    call = _Call(spec, sinks, slopes, key_lengths, cu_seqlens)
    step = spec.block or _ROWS
    plan = schedule(spec.mask, M, N, H, step, spec.block or _KEYS, spec.offset)
    inputs = (q, k, v, sinks, slopes, bias, temperature)
    again = (
        torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in inputs)
        and work(plan).pairs > _KEEP_PAIRS * H
    )
    outs, sums = [], []
    with full_precision(q.device):
        for r, columns in enumerate(_columns(plan.starts, plan.blocks, plan.block_k, N)):
            rows = slice(r * step, min((r + 1) * step, M))
            at = columns.to(q.device)
            listed = None if blocks is None else _listed(blocks[:, :, r], at // spec.block)
            part = (
                *(q[:, :, rows], _pick(k, at, 2), _pick(v, at, 2)),
                None if bias is None else _pick(bias[:, :, rows], at, 3),
                None if temperature is None else temperature[:, rows],
            )
            if again:
                done = checkpoint(_attend, call, rows, at, listed, *part, use_reentrant=False)
            else:
                done = _attend(call, rows, at, listed, *part)
            outs.append(done[0])
            sums.append(done[1])
        return torch.cat(outs, 2).to(v.dtype), torch.cat(sums, 2)


def _columns(starts: Tensor, blocks: Tensor, block: int, N: int) -> Iterator[Tensor]:
    """Keys that any head visits, ascending, for each query block."""
    for r in range(starts.shape[1] - 1):
        lists = [blocks[int(a[r]) : int(a[r + 1])] for a in starts]
        unique = lists[0] if len(lists) == 1 else torch.from_numpy(np.unique(torch.cat(lists)))
        keys = (unique.long()[:, None] * block + torch.arange(block)).flatten()
        yield keys[keys < N]


def _pick(x: Tensor, at: Tensor, axis: int) -> Tensor:
    return x if at.numel() == x.shape[axis] else x.index_select(axis, at)


def _listed(blocks: Tensor, number: Tensor) -> Tensor:
    """(B, Hkv, keys) bool: key blocks in the run-time list of this query block, (B, Hkv, L)."""
    count = int(number.max()) + 2 if number.numel() else 1
    # Numbers beyond the scheduled keys and the -1 at the end share the last, unread slot.
    slot = torch.where((blocks >= 0) & (blocks < count - 1), blocks, count - 1).long()
    seen = torch.zeros(*blocks.shape[:2], count, dtype=torch.bool, device=blocks.device)
    return seen.scatter(-1, slot, True).index_select(-1, number)


def _attend(
    call: _Call,
    rows: slice,
    at: Tensor,
    listed: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One query block: q (B, H, R, Dk) against the T keys at positions `at`."""
    spec = call.spec
    B, H, R, Dk = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    grouped = wide(q).reshape(B, Hkv, H // Hkv * R, Dk)
    score = (grouped @ wide(k).transpose(-1, -2)).view(B, H, R, T) * spec.scale
    if temperature is not None:
        score = score * temperature.to(score.dtype)[:, :, None]
    if spec.softcap is not None:
        score = spec.softcap * torch.tanh(score / spec.softcap)
    i = torch.arange(rows.start, rows.stop, device=q.device) + spec.offset
    if call.slopes is not None:
        score = score - call.slopes.to(score.dtype)[:, None, None] * (i[:, None] - at)
    if bias is not None:
        score = score + bias
    allowed = _allowed(call, i, at, H)
    if listed is not None:
        allowed = allowed & listed.repeat_interleave(H // Hkv, 1)[:, :, None]
    score = score.masked_fill(~allowed, -torch.inf)

    if spec.weight == "sigmoid":
        weight, sums = torch.sigmoid(score), score.new_zeros(B, H, R)
    else:
        weight, sums = softmax(score, call.sinks)
    values = weight.view(B, Hkv, H // Hkv * R, T) @ wide(v)
    return values.view(B, H, R, -1), sums


def _allowed(call: _Call, i: Tensor, j: Tensor, heads: int) -> Tensor:
    """(1|B, 1|H, R, T) bool: the predicate, key lengths and packed sequences."""
    row = i[:, None]
    if "h" in lower(call.spec.mask).names:
        h = torch.arange(heads, device=i.device)[:, None, None]
        allowed = evaluate(call.spec.mask, row, j, h)[None]
    else:
        allowed = evaluate(call.spec.mask, row, j)[None, None]
    if call.key_lengths is not None:
        allowed = allowed & (j < call.key_lengths[:, None])[:, None, None]
    if call.cu_seqlens is not None:
        ends = call.cu_seqlens.to(i.dtype).contiguous()
        mine, other = (torch.searchsorted(ends, x.contiguous(), right=True) for x in (i, j))
        # Number 0 lies before the first sequence, S + 1 behind the last.
        inside = (mine > 0) & (mine < ends.numel())
        allowed = allowed & ((mine[:, None] == other) & inside[:, None])
    return allowed
