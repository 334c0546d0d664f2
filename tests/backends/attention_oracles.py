"""Exact attention in float64 from its definition, over the whole matrix, nothing in blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sigmoid: bool = False,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps; `allowed` broadcasts to (B, H, M, N)."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    if temperature is not None:
        score = score * temperature.double()[None, :, :, None]
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if slopes is not None:
        i = torch.arange(q.shape[2])[:, None] + offset
        distance = i - torch.arange(k.shape[2])
        score = score - slopes.double()[None, :, None, None] * distance
    if bias is not None:
        score = score + bias.double()
    allowed = allowed.expand(score.shape)
    if sigmoid:
        weight = torch.sigmoid(score) * allowed
        return weight @ v, score.new_zeros(score.shape[:3])
    sink = score.new_full((1,), -torch.inf) if sinks is None else sinks.double()
    last = sink[None, :, None, None].expand(*score.shape[:3], 1)
    logits = torch.cat((score.masked_fill(~allowed, -torch.inf), last), -1)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weight = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, logits), -1))
    lse = torch.where(empty[..., 0], -torch.inf, torch.logsumexp(logits, -1))
    return weight[..., :-1] @ v, lse


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal infinities, no NaN, and errors within `tolerance` of the largest finite value."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    size = max(1.0, float(expected[finite].abs().max())) if finite.any() else 1.0
    error = (found.double() - expected)[finite].abs()
    assert not error.isnan().any()
    assert error.numel() == 0 or float(error.max()) <= tolerance * size
