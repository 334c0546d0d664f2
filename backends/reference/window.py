"""Reference kernel of `WindowAttention`: softmax over sinks and a sliding or symmetric window."""

from __future__ import annotations

import torch

from rewriter.backends.reference.mean import with_mean
from rewriter.backends.reference.near import attend, next_state
from rewriter.backends.reference.precision import full_precision
from rewriter.backends.reference.step import attend_one, serves
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.state import State


def window_attention(
    spec: WindowAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """Attend with n new tokens after those in `state`.

    Args:
        spec: what to compute.
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv).
        valid: (B, n) bool, False at padding; None means all valid.
        bias: (1|B, 1|H, 1|n, seen + n) finite additive bias of the logits, or None.
        state: tensors of `state_of(spec)`; None when the sequence starts here. Bidirectional
            attention has none.

    Returns:
        (B, H, n, Dv) in the dtype of v, zero where a query sees no key, and the new state.
    """
    n = q.shape[-2]
    if state is not None and serves(spec, n, bias, state):
        with full_precision(q.device):
            step = attend_one(spec, q, k, v, valid, state)
            out = step.softmax()
        return out.to(v.dtype), next_state(spec, step.context, state, n)
    with full_precision(q.device):
        near = attend(spec, q, k, v, valid=valid, bias=bias, state=state)
        rest: State = {}
        if spec.mean:
            near, rest = with_mean(spec, q, near, state)
        mass = near.denominator
        out = near.numerator / torch.where(mass > 0, mass, 1.0)
    after = None if state is None else {**next_state(spec, near.context, state, n), **rest}
    return out.to(v.dtype), after
