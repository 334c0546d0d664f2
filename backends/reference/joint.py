"""Reference kernel of `JointWindowLinear`: softmax near, linear far, one normaliser.

A key enters the far state when it leaves the window, `window` tokens after it came, so at every
token each earlier key is counted once: as a sink, in the window or in the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewriter.backends.reference.factored import scan_factored
from rewriter.backends.reference.near import Context, attend, next_state
from rewriter.backends.reference.precision import full_precision, wide
from rewriter.backends.reference.recurrence.flow import Flow
from rewriter.backends.reference.recurrence.normaliser import normalise, with_ones
from rewriter.backends.reference.recurrence.scan import scan
from rewriter.backends.reference.step import attend_one, serves
from rewriter.ir.kernels import JointWindowLinear, WindowAttention
from rewriter.ir.state import State


def joint_window_linear(
    spec: JointWindowLinear,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    fq: torch.Tensor,
    key_features: Callable[[torch.Tensor], torch.Tensor],
    ratio: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """Attend with n new tokens after those in `state`.

    Args:
        spec: window, sinks, scale, softcap, feature width m, hidden branches.
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv).
        fq: (B, H, n, m) non-negative features of the queries; with `spec.factors` their parts.
        key_features: maps (B, Hkv, t, Dk) keys to (B, Hkv, t, m) features. It is called on the
            keys that leave the window, so features of near keys are never computed or stored.
        ratio: (H,) positive weight r_h of the far part.
        valid: (B, n) bool, False at padding; None means all valid.
        state: tensors of `state_of(spec)`; None when the sequence starts here.

    Returns:
        (B, H, n, Dv) in the dtype of v, zero where a query sees no key, and the new state.
    """
    near_spec = WindowAttention(spec.window, spec.sinks, True, spec.scale, spec.softcap)
    n = q.shape[-2]
    with full_precision(q.device):
        if state is not None and serves(near_spec, n, None, state):
            step = attend_one(near_spec, q, k, v, valid, state)
            mass, context = step.masses(), step.context
        else:
            near = attend(
                near_spec, q, k, v, valid=valid, bias=None, state=state, top_gradient=True
            )
            mass, context = torch.cat((near.numerator, near.denominator), -1), near.context
        if "window" in spec.hidden:
            mass = torch.zeros_like(mass)
        after: State | None = None
        # Without a state nothing leaves a window that is at least as long as the sequence.
        if state is not None or n > spec.window:
            leaving = key_features(context.keys[:, :, :n])
            values = with_ones(context.values[:, :, :n], _far_keys(spec, context, state, n))
            dtype = values.dtype
            before = None if state is None else state["far"].to(dtype)
            if spec.factors:
                read, end = scan_factored(
                    fq.to(dtype), leaving.to(dtype), values, spec.factors, before, state is not None
                )
            else:
                read, end = scan(
                    Flow(fq.to(dtype), leaving.to(dtype), values, exclusive=True), before
                )
            if "linear" not in spec.hidden:
                mass = mass + wide(ratio)[None, :, None, None] * read
            if state is not None:
                after = {**next_state(near_spec, context, state, n), "far": end}
        return normalise(mass).to(v.dtype), after


def _far_keys(
    spec: JointWindowLinear, context: Context, state: State | None, n: int
) -> torch.Tensor:
    """(B | 1, n) bool: keys leaving the window that are valid and not sinks."""
    sinks = context.sinks.at
    seen = state["seen"] if state is not None else sinks.new_zeros(1)
    at = (seen + (1 - spec.window))[:, None]
    if n > 1:
        at = at + torch.arange(n, device=at.device)
    sunk = (at[:, :, None] == sinks[:, None, :]).any(-1)
    # Slots before the first token have negative positions and are invalid, like empty sinks (-1).
    return context.valid[:, :n] & ~sunk
