"""Oracles of `Recurrence`: the token loop of its definition in float64, head by head, no chunks.

Bidirectional and max-normalised forms are written from their weights, pair by pair.
"""

from __future__ import annotations

import torch
from recurrence_cases import Call
from torch import Tensor

from rewriter.ir.recurrence import Recurrence

Wide = torch.float64


def token_loop(spec: Recurrence, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, H, n, Dv) and the end state of a causal call, float64."""
    x = call.double()
    B, H, n, _ = x.q.shape
    Hkv = x.k.shape[1]
    out = torch.zeros(B, H, n, spec.value_dim, dtype=Wide)
    width = spec.state_width
    ends = {"S": torch.zeros(B, Hkv, spec.key_dim, width, dtype=Wide)}
    if spec.normaliser == "max":
        ends["m"] = torch.full((B, Hkv), -torch.inf, dtype=Wide)
    for b in range(B):
        for g in range(Hkv):
            heads = range(g * H // Hkv, (g + 1) * H // Hkv)
            S = torch.zeros(spec.key_dim, width, dtype=Wide)
            m = torch.tensor(-torch.inf, dtype=Wide)
            if x.state is not None:
                S = x.state["S"][b, g]
                m = x.state["m"][b, g] if "m" in x.state else m
            for t in range(n):
                old, before = S, m
                if x.valid is None or bool(x.valid[b, t]):
                    S, m = _write(spec, x, b, g, t, S, m)
                else:
                    continue
                for h in heads:
                    q = spec.scale * x.q[b, h, t]
                    read = q @ (S if spec.read == "inclusive" else old)
                    if x.bonus is not None:
                        read = read + (q * x.bonus[g] * x.k[b, g, t]).sum() * _value(
                            spec, x, b, g, t
                        )
                    top = m if spec.read == "inclusive" else before
                    out[b, h, t] = _normalise(spec, read, top)
            ends["S"][b, g] = S
            if "m" in ends:
                ends["m"][b, g] = m
    return out, ends


def _value(spec: Recurrence, x: Call, b: int, g: int, t: int) -> Tensor:
    v = x.v[b, g, t]
    return v if spec.normaliser == "none" else torch.cat((v, torch.ones(1, dtype=Wide)))


def _write(
    spec: Recurrence, x: Call, b: int, g: int, t: int, S: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    k, v = x.k[b, g, t], _value(spec, x, b, g, t)
    decay = torch.zeros(spec.key_dim, dtype=Wide)
    if x.decay is not None:
        decay = decay + (x.decay[g] if spec.decay == "head" else x.decay[b, g, t])
    if spec.normaliser == "max":
        assert x.gate is not None
        i = x.gate[b, g, t]
        top = torch.maximum(decay[0] + m, i)
        if top == -torch.inf:
            return S, top
        S = (decay[0] + m - top).exp() * S if m > -torch.inf else torch.zeros_like(S)
        return S + (i - top).exp() * torch.outer(k, v), top
    kept = decay.exp()[:, None] * S
    if x.beta is not None:
        a, add, w = decay.exp() * k, -x.beta[b, g, t] * k, x.beta[b, g, t]
        return kept + torch.outer(add, a @ S) + w * torch.outer(k, v), m
    if x.erase is not None and x.add is not None:
        kept = kept + torch.outer(x.add[b, g, t], x.erase[b, g, t] @ S)
    return kept + torch.outer(k, v), m


def _normalise(spec: Recurrence, read: Tensor, top: Tensor) -> Tensor:
    if spec.normaliser == "none":
        return read
    mass = read[-1]
    if spec.normaliser == "ones":
        return read[:-1] / mass if mass > 0 else torch.zeros_like(read[:-1])
    if top == -torch.inf:
        return torch.zeros_like(read[:-1])
    return read[:-1] / torch.maximum(mass.abs(), (-top).exp())


def pairwise(spec: Recurrence, call: Call) -> Tensor:
    """A bidirectional call from its matrix of weights, float64."""
    x = call.double()
    B, H, n, _ = x.q.shape
    out = torch.zeros(B, H, n, spec.value_dim, dtype=Wide)
    for b in range(B):
        for h in range(H):
            g = h * x.k.shape[1] // H
            real = torch.ones(n, dtype=torch.bool) if x.valid is None else x.valid[b]
            step = torch.zeros(n, dtype=Wide)
            if x.decay is not None:
                step = step + (x.decay[g] if spec.decay == "head" else x.decay[b, g])
            step = step * real
            log = torch.zeros(n, n, dtype=Wide)
            for i in range(n):
                for j in range(n):
                    log[i, j] = step[min(i, j) + 1 : max(i, j) + 1].sum()
            if x.gate is not None:
                log = log + x.gate[b, g]
            log = log.masked_fill(~real, -torch.inf)
            top = log.amax(-1)
            dots = spec.scale * (x.q[b, h] @ x.k[b, g].T)
            for i in range(n):
                if not bool(real[i]) or top[i] == -torch.inf:
                    continue
                shift = top[i] if spec.normaliser == "max" else torch.zeros((), dtype=Wide)
                weight = torch.where(real, dots[i] * (log[i] - shift).exp(), 0.0)
                values = torch.stack([_value(spec, x, b, g, j) for j in range(n)])
                out[b, h, i] = _normalise(spec, weight @ values, top[i])
    return out
