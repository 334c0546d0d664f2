"""Reference kernel of `LinearAttention`: normalised linear attention over mapped features."""

from __future__ import annotations

import torch

from rewriter.backends.reference.far import normalise, scan, total, with_ones
from rewriter.backends.reference.precision import full_precision
from rewriter.ir.kernels import LinearAttention
from rewriter.ir.state import State


def linear_attention(
    spec: LinearAttention,
    fq: torch.Tensor,
    fk: torch.Tensor,
    v: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """Attend with n new tokens after those in `state`.

    Args:
        spec: direction and feature width m.
        fq, fk: (B, H, n, m), (B, Hkv, n, m) non-negative features. v: (B, Hkv, n, Dv).
        valid: (B, n) bool, False at padding; None means all valid.
        state: tensors of `state_of(spec)`; None when the sequence starts here. Bidirectional
            attention has none.

    Returns:
        (B, H, n, Dv) in the dtype of v, zero where a query sees no key, and the new state.
    """
    with full_precision(fq.device):
        values = with_ones(v, valid)
        if not spec.causal:
            return normalise(total(fq, fk, values)).to(v.dtype), None
        start = None if state is None else state["far"]
        read, end = scan(fq, fk, values, start, inclusive=True)
        out = normalise(read).to(v.dtype)
    return out, None if state is None else {"far": end}
