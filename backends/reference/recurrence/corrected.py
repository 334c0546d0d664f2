"""Chunks with a low-rank correction: the delta rule, and its form with untied vectors.

What a token reads of the state before it, u_t = a_t^T S_{t-1}, depends on the earlier u of its
chunk through a unit lower triangular system. Its inverse is applied to the part that is known and
to the part that multiplies the state, for all chunks at once; then the chunks follow one another
with products only. Catalogue: linear.md section 2 (DELTA).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.reference.recurrence.chunks import Chunks, cut
from rewriter.backends.reference.recurrence.flow import Flow
from rewriter.backends.reference.recurrence.pairs import pair_weights


def scan_corrected(x: Flow, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scan with `beta` or with `erase` and `add`; otherwise as `tokens.scan_tokens`."""
    c = cut(x)
    state = x.zero_state() if start is None else start
    if x.beta is not None:
        lead, known, seen = _delta(c, c.tokens(x.beta))
        direct: tuple[Tensor | None, ...] = (None,) * c.k.shape[2]
    else:
        assert x.erase is not None and x.add is not None
        lead = c.tokens(x.add)
        known, seen = _untied(c, c.tokens(x.erase), lead)
        direct = (c.to_end(c.k).transpose(-1, -2) @ c.v).unbind(2)
    states, values = [], []
    writes = c.to_end(lead).transpose(-1, -2).unbind(2)
    parts = zip(known.unbind(2), seen.unbind(2), writes, c.kept(), direct, strict=True)
    for base, through, write, kept, own in parts:
        states.append(state)
        value = base + through @ state
        values.append(value)
        state = (state if kept is None else state * kept) + write @ value
        if own is not None:
            state = state + own
    inside = [(lead, torch.stack(values, 2))]
    if x.beta is None:
        inside.append((c.k, c.v))
    return c.read(torch.stack(states, 2), inside), state


def _delta(c: Chunks, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Written values are known + seen @ state, with the keys themselves as writing vectors."""
    among = pair_weights(c.k.unsqueeze(-2), c.k, c.total, c.total, strict=True).squeeze(-2)
    right = torch.cat((beta * c.v, -beta * c.decayed(c.k, c.total)), -1)
    known, seen = _solve(-beta * among, right, c.v.shape[-1])
    return c.k, known, seen


def _untied(c: Chunks, erase: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
    """Values read by `erase` are known + seen @ state."""
    readers = erase.unsqueeze(-2)
    of_add = pair_weights(readers, add, c.before, c.total, strict=True).squeeze(-2)
    of_key = pair_weights(readers, c.k, c.before, c.total, strict=True).squeeze(-2)
    right = torch.cat((of_key @ c.v, c.decayed(erase, c.before)), -1)
    return _solve(of_add, right, c.v.shape[-1])


def _solve(strict: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(1 - strict)^-1 right, its first `width` columns and the others; `strict` strictly lower."""
    system = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device) - strict
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved[..., :width], solved[..., width:]
