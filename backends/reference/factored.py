"""Linear attention whose features are the outer product of two parts, f(x) = a(x) (x) b(x).

f(q).f(k) = (a(q).a(k)) (b(q).b(k)), so within a stretch of tokens pairs are weighed by two narrow
products and the wide features are never made. Only a state is read and written with them. A pair
costs the widths of the parts, a token of the state their product: stretches are so long that both
cost about the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256


def outer(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """f: (..., sum of factors) to (..., product of factors); x itself if there are no factors."""
    if not factors:
        return x
    first, *rest = torch.split(x, list(factors), -1)
    for part in rest:
        first = (first.unsqueeze(-1) * part.unsqueeze(-2)).flatten(-2)
    return first


def read_pairs(fq: Tensor, fk: Tensor, v: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, H, n, W): token t reads the keys before it. Arguments as those of `scan_factored`."""
    B, H, n, _ = fq.shape
    Hkv = fk.shape[1]
    keys = torch.split(fk, list(factors), -1)
    queries = [x.view(B, Hkv, H // Hkv, n, -1) for x in torch.split(fq, list(factors), -1)]
    out: list[Tensor] = []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        weight: Tensor | None = None
        for q, k in zip(queries, keys, strict=True):
            rows = q[:, :, :, start:stop].reshape(B, Hkv, -1, q.shape[-1])
            dots = rows @ k[:, :, :stop].mT
            weight = dots if weight is None else weight * dots
        assert weight is not None
        at = torch.arange(start, stop, device=fq.device)[:, None]
        later = torch.arange(stop, device=fq.device) >= at
        weight = weight.view(B, Hkv, -1, stop - start, stop).masked_fill(later, 0.0)
        part = weight.flatten(2, 3) @ v[:, :, :stop]
        out.append(part.view(B, H, stop - start, v.shape[-1]))
    return torch.cat(out, 2) if out else fq.new_zeros(B, H, 0, v.shape[-1])


def read_state(fq: Tensor, state: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, H, n, W): every token reads the same state, (B, Hkv, product of factors, W)."""
    B, H = fq.shape[:2]
    Hkv, wide, W = state.shape[1:]
    parts = []
    for rows in torch.split(fq, ROWS, 2):
        features = outer(rows, factors).view(B, Hkv, -1, wide)
        parts.append((features @ state).view(B, H, -1, W))
    return torch.cat(parts, 2)


def scan_factored(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    factors: tuple[int, ...],
    start: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each token reads the state before it, then writes to it.

    Args:
        fq, fk: (B, H, n, sum of factors), (B, Hkv, n, the same), the parts side by side.
        v: (B, Hkv, n, W).
        factors: widths of the parts.
        start: (B, Hkv, product of factors, W) state before the first token, or None for zero.
        keep: whether the state after the last token is wanted.

    Returns:
        (B, H, n, W) reads and the state after the last token (else one before it), in the dtype
        of the inputs.
    """
    B, H, n, _ = fq.shape
    wide = torch.Size(factors).numel()
    state = start
    if start is None:
        state = fq.new_zeros(B, fk.shape[1], wide, v.shape[-1])
    assert state is not None
    stretch = max(1, wide // 2)
    out: list[Tensor] = []
    for begin in range(0, n, stretch):
        at = slice(begin, min(begin + stretch, n))
        keys, values = fk[:, :, at], v[:, :, at]
        read = read_pairs(fq[:, :, at], keys, values, factors)
        if begin > 0 or start is not None:
            read = read + read_state(fq[:, :, at], state, factors)
        out.append(read)
        if keep or at.stop < n:
            state = state + outer(keys, factors).mT @ values
    return (torch.cat(out, 2) if out else fq.new_zeros(B, H, 0, v.shape[-1])), state
