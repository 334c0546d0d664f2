"""Start of a soft hash from data: bits on which a query and the keys it looks back at agree.

Canonical correlations (Hotelling 1936) of a query with the keys it attends to: of all directions
with uncorrelated projections these agree best, so their signs are bits that are nearly independent
and nearly even over the keys, and equal for a query and its key as often as a linear map allows.
Keys weigh by the square of their attention, so that heads and queries that look at single tokens
count and those that look at everything do not. The query heads of a group share the directions of
their keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewriter.mixers.linear.features import HashMap

SPREAD = 3.0
LEAST = 1e-4


def fit_hash(
    map_q: HashMap, map_k: HashMap, q: Tensor, k: Tensor, far: Iterator[tuple[slice, Tensor]]
) -> None:
    """Set both maps, or leave them where there is nothing to learn from.

    Args:
        q, k: (B, H, n, d), (B, Hkv, n, d).
        far: blocks of queries with their attention to far keys, (B, H, rows, n) float32, and 0 to
            all others.
    """
    (B, H, n, width), Hkv = q.shape, k.shape[1]
    group, bits = H // Hkv, map_k.weight.shape[-1]
    if bits > width or n < 2:
        return
    q, k = q.double() * map_q.factor, k.double() * map_k.factor
    (mean_q, white_q), (mean_k, white_k) = _whitened(q), _whitened(k)
    keys, queries = ((k - mean_k) @ white_k).float(), ((q - mean_q) @ white_q).float()
    cross = q.new_zeros(H, width, width)
    mass = q.new_zeros(H)
    for rows, weight in far:
        peaked = weight.square().view(B, Hkv, -1, n)
        seen = (peaked @ keys).view(B, H, -1, width)
        cross += (queries[:, :, rows].mT @ seen).sum(0).double()
        mass += peaked.view(B, H, -1).sum((0, 2)).double()
    if not bool((mass > 0).all()):
        return
    both = cross.view(Hkv, group * width, width)
    shared = torch.linalg.svd(both, full_matrices=False).Vh[:, :bits].mT  # (Hkv, width, bits)
    of_q = cross @ shared.repeat_interleave(group, 0)
    of_q = of_q / of_q.norm(dim=1, keepdim=True).clamp_min(1e-30)
    with torch.no_grad():
        for hashed, mean, directions in (
            (map_q, mean_q, white_q @ of_q),
            (map_k, mean_k, white_k @ shared),
        ):
            hashed.weight.copy_(SPREAD * directions)
            hashed.bias.copy_(-mean @ (SPREAD * directions))


def _whitened(x: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, 1, d) mean and (heads, d, d) inverse root of the covariance of (B, heads, n, d)."""
    x = x.transpose(0, 1).flatten(1, 2)
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred / x.shape[1])
    values = values.clamp_min(values[:, -1:] * LEAST).clamp_min(1e-30)
    return mean, vectors @ (values.rsqrt()[..., None] * vectors.mT)
