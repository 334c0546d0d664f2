"""Oracles for the kernels: row by row in float64, from the definition, with no block or state."""

from __future__ import annotations

import torch
from torch import Tensor


def _near(i: int, valid: list[bool], window: int, sinks: int, causal: bool) -> set[int]:
    tokens = [j for j, ok in enumerate(valid) if ok]
    first = set(tokens[:sinks])
    close = {j for j in tokens if (i - j if causal else abs(i - j)) < window}
    return {j for j in close | first if not causal or j <= i}


def _logit(q: Tensor, k: Tensor, scale: float, cap: float | None) -> Tensor:
    out = (q * k).sum() * scale
    return out if cap is None else cap * torch.tanh(out / cap)


def window_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    *,
    window: int,
    sinks: int,
    causal: bool,
    scale: float,
    cap: float | None = None,
    limit: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    B, H, n, _ = q.shape
    group = H // k.shape[1]
    out = torch.zeros(B, H, n, v.shape[-1], dtype=torch.float64)
    wide = None if bias is None else bias.double().expand(B, H, n, n)
    for b in range(B):
        for i in range(n):
            near = sorted(_near(i, valid[b].tolist(), window, sinks, causal))
            if limit is not None:
                near = [j for j in near if (i - j if causal else abs(i - j)) < limit]
            for h in range(H if near else 0):
                g = h // group
                s = torch.stack([_logit(q[b, h, i], k[b, g, j], scale, cap) for j in near])
                if wide is not None:
                    s = s + wide[b, h, i, near]
                out[b, h, i] = torch.softmax(s, 0) @ v[b, g, near]
    return out


def linear_rows(fq: Tensor, fk: Tensor, v: Tensor, valid: Tensor, *, causal: bool) -> Tensor:
    """The token recurrence S += f(k) v^T, z += f(k); padded tokens read 0."""
    fq, fk, v = fq.double(), fk.double(), v.double()
    B, H, n, m = fq.shape
    group = H // fk.shape[1]
    out = torch.zeros(B, H, n, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // group
            S = torch.zeros(m, v.shape[-1], dtype=torch.float64)
            z = torch.zeros(m, dtype=torch.float64)
            reads = []
            for t in range(n):
                if valid[b, t]:
                    S = S + torch.outer(fk[b, g, t], v[b, g, t])
                    z = z + fk[b, g, t]
                reads.append((S, z))
            for t in range(n):
                S, z = reads[t] if causal else reads[-1]
                if valid[b, t] and z.abs().sum() > 0:
                    out[b, h, t] = (fq[b, h, t] @ S) / (fq[b, h, t] @ z)
    return out


def joint_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    ratio: Tensor,
    valid: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    cap: float | None = None,
    hidden: frozenset[str] = frozenset(),
) -> Tensor:
    """Near keys by softmax, every other earlier valid key by features, from the two key sets."""
    q, k, v, fq, fk = (x.double() for x in (q, k, v, fq, fk))
    B, H, n, _ = q.shape
    group = H // k.shape[1]
    out = torch.zeros(B, H, n, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        row = valid[b].tolist()
        for i in range(n):
            near = sorted(_near(i, row, window, sinks, True))
            far = [j for j in range(i + 1) if row[j] and j not in near]
            for h in range(H):
                g = h // group
                weights: list[Tensor] = []
                keys: list[int] = []
                if near and "window" not in hidden:
                    s = torch.stack([_logit(q[b, h, i], k[b, g, j], scale, cap) for j in near])
                    weights.append((s - s.max()).exp())
                    keys += near
                if far and "linear" not in hidden:
                    weights.append(float(ratio[h]) * (fk[b, g, far] @ fq[b, h, i]))
                    keys += far
                if keys:
                    w = torch.cat(weights)
                    out[b, h, i] = (w @ v[b, g, keys]) / w.sum()
    return out
