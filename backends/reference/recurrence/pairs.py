"""Weights between the tokens of a chunk: sum_d x_id y_jd exp(rows_id - cols_jd), j <= i or j < i.

No exponent is positive. With one decay per token the differences are masked before `exp`. With
one per channel they lie inside the dot product, which does not factor over a whole chunk: the
chunk is halved again and again, and the pairs between a later and an earlier half are one product
with both exponents taken against the first row of the later half. Catalogue: linear.md section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_weights(
    x: Tensor, y: Tensor, rows: Tensor | None, cols: Tensor | None, *, strict: bool
) -> Tensor:
    """Weights of one chunk, zero above the diagonal (strict: on it too).

    Args:
        x: (..., C, G, Dk), G readers per token. y: (..., C, Dk). C is a power of two.
        rows, cols: exponents (..., C, 1) or (..., C, Dk), non-increasing over C, with
            rows_i <= cols_j wherever j is allowed; or None for zero. Not strict: rows_i = cols_i.

    Returns:
        (..., C, G, C).
    """
    if rows is None or cols is None or rows.shape[-1] == 1:
        return _scalar(x, y, rows, cols, strict)
    return _channels(x, y, rows, cols, strict)


def _scalar(x: Tensor, y: Tensor, rows: Tensor | None, cols: Tensor | None, strict: bool) -> Tensor:
    C = y.shape[-2]
    hidden = torch.ones(C, C, dtype=torch.bool, device=x.device).triu(0 if strict else 1)
    weight = torch.unflatten(x.flatten(-3, -2) @ y.transpose(-1, -2), -2, x.shape[-3:-1])
    if rows is None or cols is None:
        return weight.masked_fill(hidden[:, None], 0.0)
    apart = (rows - cols.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    return weight * apart.to(x.dtype).exp().unsqueeze(-2)


def _channels(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, strict: bool) -> Tensor:
    C, G = x.shape[-3:-1]
    # Blocks of one token: rows_i = cols_i, so nothing decays.
    weight = (x * y.unsqueeze(-2)).sum(-1)[..., None, :, None]
    if strict:
        weight = torch.zeros_like(weight)
    size = 1
    while size < C:
        late = torch.unflatten(x, -3, (-1, 2, size)).select(-4, 1)
        late_rows = torch.unflatten(rows, -2, (-1, 2, size)).select(-3, 1)
        early = torch.unflatten(y, -2, (-1, 2, size)).select(-3, 0)
        early_cols = torch.unflatten(cols, -2, (-1, 2, size)).select(-3, 0)
        first = late_rows[..., :1, :]
        late = late * (late_rows - first).to(x.dtype).exp().unsqueeze(-2)
        early = early * (first - early_cols).to(x.dtype).exp()
        cross = late.flatten(-3, -2) @ early.transpose(-1, -2)
        upper, lower = torch.unflatten(weight, -4, (-1, 2)).unbind(-4)
        cross = torch.unflatten(cross, -2, (size, G))
        weight = torch.cat(
            (
                torch.cat((upper, torch.zeros_like(upper)), -1),
                torch.cat((cross, lower), -1),
            ),
            -3,
        )
        size *= 2
    return weight.squeeze(-4)
