"""Oracle of `Recurrence`: one token after another in float64, straight from the definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.ir.recurrence import Recurrence

FIELDS = ("q", "k", "v", "decay", "beta", "erase", "add", "bonus", "start")


def wide(x: RecurrenceInputs) -> RecurrenceInputs:
    """The same inputs in float64."""
    given = {n: getattr(x, n) for n in FIELDS if getattr(x, n) is not None}
    return replace(x, **{n: t.double() for n, t in given.items()})


def rows(spec: Recurrence, x: RecurrenceInputs) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) and end states (rows, Hkv, Dk, width), differentiable."""
    x = wide(x)
    if x.cu_seqlens is None:
        parts = [(slice(b, b + 1), slice(None), b) for b in range(x.q.shape[0])]
    else:
        cuts = x.cu_seqlens.tolist()
        spans = pairwise(cuts)
        parts = [(slice(0, 1), slice(a, b), s) for s, (a, b) in enumerate(spans)]
    outs, ends = [], []
    for b, t, s in parts:
        out, end = _sequence(spec, x, b, t, s)
        outs.append(out)
        ends.append(end)
    joined = torch.stack(outs) if x.cu_seqlens is None else torch.cat(outs, 1)[None]
    return joined, torch.stack(ends)


def _sequence(
    spec: Recurrence, x: RecurrenceInputs, b: slice, t: slice, s: int
) -> tuple[Tensor, Tensor]:
    q, k, v = x.q[b, :, t][0], x.k[b, :, t][0], x.v[b, :, t][0]
    H, n, _ = q.shape
    G, dk = k.shape[0], k.shape[2]
    if spec.normaliser == "ones":
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if spec.decay == "none" or x.decay is None:
        g = torch.zeros(G, n, dk, dtype=torch.float64)
    elif spec.decay == "head":
        g = x.decay[:, None, None].expand(G, n, dk)
    else:
        part = x.decay[b, :, t][0]
        g = part if spec.decay == "channel" else part[..., None].expand(G, n, dk)
    if not spec.causal:
        return _global(spec, q, k, v, g), torch.zeros(G, dk, v.shape[-1], dtype=torch.float64)
    S = torch.zeros(G, dk, v.shape[-1], dtype=torch.float64) if x.start is None else x.start[s]
    outs = [torch.zeros(H, spec.state_width, dtype=torch.float64)]  # an empty sequence has none
    for i in range(n):
        before, write = S, k[:, i, :, None] * v[:, i, None, :]
        S = g[:, i].exp()[..., None] * S
        if spec.correction == "delta" and x.beta is not None:
            beta = x.beta[b, :, t][0][:, i, None, None]
            seen = torch.einsum("gd,gde->ge", k[:, i], S)
            S = S + beta * (write - k[:, i, :, None] * seen[:, None, :])
        elif spec.correction == "untied" and x.erase is not None and x.add is not None:
            seen = torch.einsum("gd,gde->ge", x.erase[b, :, t][0][:, i], before)
            S = S + x.add[b, :, t][0][:, i, :, None] * seen[:, None, :] + write
        else:
            S = S + write
        read = S
        if spec.read == "exclusive":
            read = before
            if spec.bonus and x.bonus is not None:
                read = read + x.bonus[..., None] * write
        outs.append(
            torch.einsum("hd,hde->he", q[:, i], read.repeat_interleave(H // G, 0)) * spec.scale
        )
    return _divided(spec, torch.stack(outs, 1)[:, 1:]), S


def _global(spec: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    group = q.shape[0] // k.shape[0]
    b = g[..., 0].cumsum(-1)
    weight = torch.exp(-(b[:, :, None] - b[:, None, :]).abs()).repeat_interleave(group, 0)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return _divided(spec, (q @ k.transpose(1, 2) * weight) @ v * spec.scale)


def _divided(spec: Recurrence, out: Tensor) -> Tensor:
    if spec.normaliser != "ones":
        return out
    total = out[..., -1:]
    safe = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, out[..., :-1] / safe, torch.zeros_like(out[..., :-1]))
