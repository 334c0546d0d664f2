"""Name the finite part of an additive term by its values."""

from __future__ import annotations

from typing import Literal

import torch

BiasKind = Literal["none", "alibi", "relative", "dense"]

_TOLERANCE = 2e-2
"""Relative: some models compute their slopes in bfloat16."""


def classify(bias: torch.Tensor, allowed: torch.Tensor) -> BiasKind:
    """Kind of an additive bias over (H, Nq, Nk), judged where `allowed` is true.

    `alibi` grows linearly with the key position, up to a constant per query (which no softmax
    sees); `relative` depends on the distance between query and key alone.
    """
    seen = bias[allowed.expand_as(bias)]
    if seen.numel() == 0 or bool((seen == 0).all()):
        return "none"
    if _linear_in_keys(bias, allowed):
        return "alibi"
    return "relative" if _by_distance(bias, allowed) else "dense"


def _linear_in_keys(bias: torch.Tensor, allowed: torch.Tensor) -> bool:
    """Neighbouring visible keys differ by one slope per head."""
    both = (allowed[..., 1:] & allowed[..., :-1]).expand(*bias.shape[:-1], -1)
    steps = (bias[..., 1:] - bias[..., :-1]).double()
    hidden = ~allowed.expand_as(bias)
    most = bias.double().masked_fill(hidden, -torch.inf).amax(-1)
    least = bias.double().masked_fill(hidden, torch.inf).amin(-1)
    span = float((most - least).max())  # of a row: what all keys of a query share means nothing
    for head, mask in zip(steps, both, strict=True):
        values = head[mask]
        if values.numel() < 2:
            return False
        if (values - values.mean()).abs().max() > _TOLERANCE * max(span, 1e-12):
            return False
    slopes = torch.stack([h[m].mean() for h, m in zip(steps, both, strict=True)])
    return bool((slopes != 0).any())


def _by_distance(bias: torch.Tensor, allowed: torch.Tensor) -> bool:
    rows, columns = bias.shape[-2:]
    distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    for d in range(1 - rows, columns):
        where = (distance == d) & allowed
        band = where.expand_as(bias)
        for head, mask in zip(bias, band, strict=True):
            values = head[mask]
            if values.numel() and float(values.max() - values.min()) > 1e-5:
                return False
    return True
