"""Softmax that leaves an empty row empty."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(score: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of scores in which hidden keys are -inf.

    Args:
        score: (B, H, R, T).
        sinks: (H,) logits of keys with value 0, which only take part in the sum, or None.

    Returns:
        (B, H, R, T) weights, 0 in a row that sees nothing, and (B, H, R) sums, -inf there. Both
        have finite gradients.
    """
    B, H, R, T = score.shape
    top = score.new_full((B, H, R, 1), -torch.inf)
    if T:
        top = score.detach().amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(score.dtype)[:, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    # With nothing visible exp(-inf - 0) is 0, where -inf - -inf would be NaN.
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    some = total > 0
    safe = torch.where(some, total, 1.0)
    sums = (safe.log() + top).masked_fill(~some, -torch.inf)
    return weight / safe, sums[..., 0]
