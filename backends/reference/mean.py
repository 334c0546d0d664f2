"""The keys that a window does not show, as one more key: their mean (`WindowAttention.mean`).

Sums of keys and values run along the text, so every query meets the mean of exactly those keys that
lie before its window. Catalogue: sparse.md, razor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.reference.near import Context, Near
from rewriter.backends.reference.precision import wide
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.state import State


def with_mean(
    spec: WindowAttention, q: Tensor, near: Near, state: State | None
) -> tuple[Near, State]:
    """The near part with the mean key in it, and the sums after the new tokens."""
    B, H, n, _ = q.shape
    context = near.context
    leaving = _leaving(spec, context, state, n)
    sums = [
        _running(x[:, :, :n], leaving, None if state is None else state[name])
        for x, name in ((context.keys, "rest_k"), (context.values, "rest_v"))
    ]
    total = F.pad(leaving.long().cumsum(1), (1, 0))
    total = total if state is None else total + state["rest"][:, None]
    keys, values, count = *(x[:, :, :n] for x in sums), total[:, :n]
    share = count.clamp_min(1)[:, None, :, None]
    group = H // keys.shape[1]
    key, value = ((x / share).repeat_interleave(group, 1) for x in (keys, values))
    score = spec.scale * (wide(q) * key).sum(-1, keepdim=True)
    score = score + count.clamp_min(1).log().to(score.dtype)[:, None, :, None]
    score = score.masked_fill((count == 0)[:, None, :, None], -torch.inf)
    top = torch.maximum(near.top, score).detach()
    kept, weight = (near.top - top).exp(), (score - top).exp()
    merged = replace(
        near,
        numerator=near.numerator * kept + weight * value,
        denominator=near.denominator * kept + weight,
        top=top,
    )
    if state is None:
        return merged, {}
    last = [x[:, :, n].float() for x in sums]
    return merged, {"rest_k": last[0], "rest_v": last[1], "rest": total[:, n].expand(B)}


def _leaving(spec: WindowAttention, context: Context, state: State | None, n: int) -> Tensor:
    """(B, n) bool: the key that the token after each new one sees no more is real and no sink.

    The context holds window - 1 earlier keys, so that is the key at the same place in it.
    """
    at = torch.arange(1, n + 1, device=context.keys.device) - spec.window
    at = at[None] if state is None else at + state["seen"][:, None]
    leaving = context.valid[:, :n] & (at >= 0)
    if spec.sinks:
        leaving = leaving & (at[..., None] != context.sinks.at[:, None]).all(-1)
    return leaving.expand(context.keys.shape[0], -1)


def _running(x: Tensor, leaving: Tensor, start: Tensor | None) -> Tensor:
    """(B, Hkv, n + 1, D) float32: sums over what has left before each token and after the last."""
    sums = F.pad((wide(x) * leaving[:, None, :, None]).cumsum(2), (0, 0, 1, 0))
    return sums if start is None else sums + start[:, :, None]
