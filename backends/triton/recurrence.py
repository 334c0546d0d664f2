"""The raw recurrence kernels of the Triton backend; interface: `backends/inputs.py`.

Not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceGrads, RecurrenceInputs
from rewriter.backends.triton.launch import Runner, execute, unavailable
from rewriter.backends.triton.recurrence_backstates import Cotangents
from rewriter.backends.triton.recurrence_backward import divided, gradients
from rewriter.backends.triton.recurrence_delta import solve
from rewriter.backends.triton.recurrence_delta_backward import delta_gradients
from rewriter.backends.triton.recurrence_forward import (
    Call,
    chunk_states,
    decay_sums,
    read_outputs,
)
from rewriter.backends.triton.recurrence_scores import query_scores
from rewriter.backends.triton.recurrence_step import LONGEST, walk
from rewriter.backends.triton.targets import DTYPES, Target, target_of
from rewriter.ir.recurrence import Decay, Recurrence


def decline(spec: Recurrence, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why these kernels cannot serve a spec, or None if they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not {dtype}"
    if max(spec.key_dim, spec.value_dim) > 256:
        return "head dims above 256 do not fit the registers of one program"
    wide = max(spec.key_dim, spec.value_dim) > 128
    if spec.correction == "delta" and wide:
        return "above head dim 128 the state of a delta rule does not fit one program"
    if spec.normaliser == "max":
        return "the max-stabilised normaliser has no Triton kernel yet"
    if not spec.causal and spec.decay != "none" and spec.normaliser != "none":
        return "a bidirectional decay with a normaliser has no Triton kernel yet"
    if needs_grad and spec.decay == "channel" and wide:
        return "the backward pass of a decay per channel spills registers above head dim 128"
    if needs_grad and _unchunked(spec):
        return "an untied correction, or a delta rule with a bonus, has no Triton backward pass yet"
    return None


def _unchunked(spec: Recurrence) -> bool:
    # A bonus reads v itself, where the chunked delta rule keeps only what is written.
    return spec.correction == "untied" or (spec.correction == "delta" and spec.bonus)


def forward(
    spec: Recurrence, x: RecurrenceInputs, run: Runner = execute, target: Target | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in the dtype of v, and the end state, float32.

    Args:
        run, target: replaced to compile for a GPU that is not there.
    """
    target = target or target_of(x.v.device)
    if not spec.causal:
        return _both_ways(spec, x, run, target), _unchanged(spec, x)
    call = Call.of(spec, x, run, target)
    if _unchunked(spec) or call.size.length <= LONGEST:
        return walk(call)
    sums = decay_sums(call)
    scores = query_scores(call, sums)
    if spec.correction == "delta":
        solved = solve(call, sums)
        out, _ = read_outputs(call, sums, solved.states, solved.fresh, scores)
        return out, solved.states.end
    states = chunk_states(call, sums)
    out, _ = read_outputs(call, sums, states, scores=scores)
    return out, states.end


def _both_ways(spec: Recurrence, x: RecurrenceInputs, run: Runner, target: Target) -> Tensor:
    x = replace(x, start=None)
    if spec.decay == "none":
        call = Call.of(spec, x, run, target)
        return read_outputs(call, None, chunk_states(call, None))[0]
    ahead, _ = forward(replace(spec, causal=True), x, run, target)
    late, _ = forward(*mirrored(spec, x), run, target)
    return ahead + late.flip(2)


def mirrored(spec: Recurrence, x: RecurrenceInputs) -> tuple[Recurrence, RecurrenceInputs]:
    """The later tokens of a bidirectional read, as an exclusive read of the reversed sequence.

    Token i reads j > i with exp(g_{i+1} + ... + g_j); reversed, the exclusive read lacks only the
    decay of the written token itself, which its key takes along.
    """
    decay, k = _each_token(spec, x), x.k
    if decay is not None:
        k = (k.float() * decay.float().exp()[..., None]).to(k.dtype)
    cuts = x.cu_seqlens
    turned = RecurrenceInputs(
        x.q.flip(2),
        k.flip(2),
        x.v.flip(2),
        None if decay is None else decay.flip(2),
        cu_seqlens=None if cuts is None else (x.q.shape[2] - cuts).flip(0),
    )
    kind: Decay = "none" if decay is None else "token"
    return replace(spec, causal=True, decay=kind, read="exclusive"), turned


def unmirrored(
    spec: Recurrence, x: RecurrenceInputs, ahead: RecurrenceGrads, late: RecurrenceGrads
) -> RecurrenceGrads:
    """Sum of the gradients of both directions, in the order of the original sequence."""
    q, k, v = (late.q.flip(2), late.k.flip(2), late.v.flip(2))
    decay = ahead.decay
    each = _each_token(spec, x)
    if each is not None and decay is not None and late.decay is not None:
        k = (k.float() * each.float().exp()[..., None]).to(k.dtype)
        more = late.decay.flip(2) + (k.float() * x.k.float()).sum(-1)
        decay = decay + (more.sum((0, 2)) if spec.decay == "head" else more)
    return RecurrenceGrads(ahead.q + q, ahead.k + k, ahead.v + v, decay)


def _each_token(spec: Recurrence, x: RecurrenceInputs) -> Tensor | None:
    if spec.decay == "head" and x.decay is not None:
        return x.decay[None, :, None].expand(x.k.shape[:3])
    return x.decay


def _unchanged(spec: Recurrence, x: RecurrenceInputs) -> Tensor:
    if x.start is not None:
        return x.start.float().clone()
    rows = x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    shape = (rows, x.k.shape[1], spec.key_dim, spec.state_width)
    return torch.zeros(shape, dtype=torch.float32, device=x.v.device)


def backward(
    spec: Recurrence,
    x: RecurrenceInputs,
    grad_out: Tensor,
    grad_end: Tensor | None,
    run: Runner = execute,
    target: Target | None = None,
) -> RecurrenceGrads:
    """Gradients of the inputs that were given; see `forward`.

    Args:
        grad_out: (B, H, N, Dv). grad_end: of the end state, None for zero.
    """
    target = target or target_of(x.v.device)
    inner = x if spec.causal else replace(x, start=None)
    call = Call.of(spec, inner, run, target)
    mass = None
    grad = grad_out.to(x.v.dtype).contiguous()
    if call.ones:
        sums = decay_sums(call)
        states = chunk_states(call, sums)
        out, weight = read_outputs(call, sums, states, scores=query_scores(call, sums))
        assert weight is not None
        grad, mass = divided(grad_out, out, weight)
    if spec.correction == "delta":
        return delta_gradients(call, Cotangents(grad, None, grad_end))
    if spec.causal:
        return gradients(call, Cotangents(grad, mass, grad_end))
    ahead = replace(call, spec=replace(spec, causal=True))
    found = gradients(ahead, Cotangents(grad, mass, None))
    turned, y = mirrored(spec, inner)
    mass = None if mass is None else mass.flip(2).contiguous()
    late = gradients(
        Call.of(turned, y, run, target), Cotangents(grad.flip(2).contiguous(), mass, None)
    )
    start = None if x.start is None or grad_end is None else grad_end.float()
    if x.start is not None and start is None:
        start = torch.zeros_like(x.start)
    return unmirrored(spec, inner, found, late)._replace(start=start)
