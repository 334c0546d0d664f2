"""The recurrence token by token: the definition, and the form for one or a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.reference.recurrence.flow import Flow


def scan_tokens(x: Flow, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Read and write the state one token at a time.

    Args:
        x: the inputs, n >= 1.
        start: (B, Hkv, Dk, W), or None for zero.

    Returns:
        (B, H, n, W) reads and the state after the last token.
    """
    B, H, n, width = x.q.shape
    Hkv, G = x.k.shape[1], x.group
    state = x.zero_state() if start is None else start
    if n == 1:
        read, state = _step(x, x.q.reshape(B, Hkv, G, width), state)
        return read.reshape(B, H, 1, -1), state
    queries = x.q.reshape(B, Hkv, G, n, width).unbind(3)
    k, v = torch.split(x.k, 1, 2), torch.split(x.v, 1, 2)
    g, beta, erase, add = (_each(t, n) for t in (x.g, x.beta, x.erase, x.add))
    reads = []
    for t in range(n):
        one = Flow(x.q, k[t], v[t], g[t], beta[t], erase[t], add[t], x.bonus, exclusive=x.exclusive)
        read, state = _step(one, queries[t], state)
        reads.append(read)
    return torch.stack(reads, 3).reshape(B, H, n, -1), state


def _each(t: Tensor | None, n: int) -> tuple[Tensor | None, ...]:
    return (None,) * n if t is None else torch.split(t, 1, 2)


def _step(x: Flow, q: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """One token. q (B, Hkv, G, Dk), `old` the state before it; returns the read and the new one."""
    column = x.k.transpose(-1, -2)
    kept = old if x.g is None else old * x.g.exp().transpose(-1, -2)
    value = x.v
    if x.beta is not None:
        # a = exp(g) k on the old state is k on the decayed one.
        value = x.beta * (x.v - x.k @ kept)
    new = torch.addcmul(kept, column, value)
    if x.erase is not None and x.add is not None:
        new = new + x.add.transpose(-1, -2) * (x.erase @ old)
    read = q @ (old if x.exclusive else new)
    if x.bonus is not None:
        read = read + (q @ (x.bonus[:, None] * x.k).transpose(-1, -2)) * x.v
    return read, new
