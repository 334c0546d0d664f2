"""Reference kernel of `Recurrence`: every variant, in plain torch, differentiable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.backends.reference.precision import full_precision
from rewriter.backends.reference.recurrence.flow import Flow
from rewriter.backends.reference.recurrence.normaliser import (
    normalise,
    normalise_max,
    running_max,
    stabilised,
    with_ones,
)
from rewriter.backends.reference.recurrence.padding import fold_padding
from rewriter.backends.reference.recurrence.scan import scan
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import State


def recurrence(
    spec: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    add: Tensor | None = None,
    bonus: Tensor | None = None,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """Read n new tokens after those in `state`.

    Args: see `Recurrence`. A float64 call is computed in float64, any other in float32.

    Returns:
        (B, H, n, Dv) in the dtype of v, and the new state: None if there was none, or if the
        recurrence is bidirectional.

    Raises:
        ValueError: an input that the spec calls for is missing, or one is given that it does not.
    """
    x = _Inputs(q, k, v, decay, beta, erase, add, bonus, gate)
    problem = _problem(spec, x, cu_seqlens)
    if problem is not None:
        raise ValueError(problem)
    with full_precision(q.device):
        if cu_seqlens is None:
            return _run(spec, x, valid, state)
        return _packed(spec, x, cu_seqlens, valid, state)


@dataclass(frozen=True)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    erase: Tensor | None
    add: Tensor | None
    bonus: Tensor | None
    gate: Tensor | None


def _problem(spec: Recurrence, x: _Inputs, cu_seqlens: Tensor | None) -> str | None:
    untied = spec.correction == "untied"
    for name, given, wanted in (
        ("decay", x.decay, spec.decay != "none"),
        ("beta", x.beta, spec.correction == "delta"),
        ("erase", x.erase, untied),
        ("add", x.add, untied),
        ("bonus", x.bonus, spec.bonus),
        ("gate", x.gate, spec.normaliser == "max"),
    ):
        if (given is not None) != wanted:
            return f"the recurrence {'needs' if wanted else 'has no'} input {name!r}"
    if cu_seqlens is not None and x.q.shape[0] != 1:
        return f"packed sequences lie in one batch row, not {x.q.shape[0]}"
    return None


def _packed(
    spec: Recurrence, x: _Inputs, cu_seqlens: Tensor, valid: Tensor | None, state: State | None
) -> tuple[Tensor, State | None]:
    """Each sequence on its own; the states have one row per sequence."""
    lengths: list[int] = cu_seqlens.diff().tolist()

    def split(t: Tensor | None, axis: int = 2) -> tuple[Tensor | None, ...]:
        return (None,) * len(lengths) if t is None else torch.split(t, lengths, axis)

    decays = (x.decay,) * len(lengths) if spec.decay == "head" else split(x.decay)
    masks = split(valid, 1)
    outs, ends = [], []
    tokens = [torch.split(t, lengths, 2) for t in (x.q, x.k, x.v)]
    extra = (split(x.beta), split(x.erase), split(x.add), split(x.gate))
    for s, (q, k, v, decay, beta, erase, add, gate, mask) in enumerate(
        zip(*tokens, decays, *extra, masks, strict=True)
    ):
        one = _Inputs(q, k, v, decay, beta, erase, add, x.bonus, gate)
        begin = None if state is None else {name: t[s : s + 1] for name, t in state.items()}
        out, end = _run(spec, one, mask, begin)
        outs.append(out)
        ends.append(end)
    after = None
    if state is not None and spec.causal:
        after = {name: torch.cat([e[name] for e in ends if e is not None]) for name in state}
    return torch.cat(outs, 2), after


def _run(
    spec: Recurrence, x: _Inputs, valid: Tensor | None, state: State | None
) -> tuple[Tensor, State | None]:
    flow, gate = _flow(spec, x)
    if valid is not None:
        flow, gate = fold_padding(flow, gate, valid)
    if not spec.causal:
        return _bidirectional(spec, flow, gate).to(x.v.dtype), None
    start = None if state is None else state["S"].to(flow.v.dtype)
    if gate is None:
        read, end = scan(flow, start)
        out = read if spec.normaliser == "none" else normalise(read)
        return out.to(x.v.dtype), None if state is None else {"S": end}
    before = None if state is None else state["m"].to(flow.v.dtype)
    read, end, top, last = _scan_max(flow, gate, start, before)
    out = normalise_max(read, _readers(top, flow)).to(x.v.dtype)
    return out, None if state is None else {"S": end, "m": last}


def _flow(spec: Recurrence, x: _Inputs) -> tuple[Flow, Tensor | None]:
    """The flow of a call and its log input gate, in the dtype of the computation."""
    dtype = torch.float64 if x.v.dtype == torch.float64 else torch.float32

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    g = cast(x.decay)
    if g is not None and spec.decay == "head":
        g = g[None, :, None, None].expand(*x.k.shape[:3], 1)
    elif g is not None and spec.decay == "token":
        g = g.unsqueeze(-1)
    beta = None if x.beta is None else x.beta.to(dtype).unsqueeze(-1)
    q, k, v = x.q.to(dtype), x.k.to(dtype), x.v.to(dtype)
    if spec.scale != 1.0:
        q = q * spec.scale
    if spec.normaliser != "none":
        v = with_ones(v)
    exclusive = spec.read == "exclusive"
    flow = Flow(q, k, v, g, beta, cast(x.erase), cast(x.add), cast(x.bonus), exclusive)
    return flow, cast(x.gate)


def _scan_max(
    x: Flow, gate: Tensor, start: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reads and end state at the scale exp(-m), the m of the reads (B, Hkv, n), the last m."""
    g = None if x.g is None else x.g.squeeze(-1)
    top, previous = running_max(gate, g, before)
    decay, weight = stabilised(gate, g, top, previous)
    flow = replace(x, k=x.k * weight.unsqueeze(-1), g=decay.unsqueeze(-1))
    read, end = scan(flow, start)
    if gate.shape[-1]:
        last = top[..., -1]
    else:
        last = gate.new_full(gate.shape[:2], -torch.inf) if before is None else before
    return read, end, previous if x.exclusive else top, last


def _readers(top: Tensor, x: Flow) -> Tensor:
    """(B, Hkv, n) per state head to (B, H, n) per query head."""
    return top.repeat_interleave(x.group, 1) if x.group > 1 else top


def _bidirectional(spec: Recurrence, x: Flow, gate: Tensor | None) -> Tensor:
    """Every token reads all tokens, with weights exp(-|b_i - b_j|) if there is a decay."""
    if x.g is None and gate is None:
        state = x.k.transpose(-1, -2) @ x.v
        B, Hkv, n, width = x.k.shape
        read = (x.q.reshape(B, Hkv, -1, width) @ state).view(B, -1, n, x.v.shape[-1])
        return read if spec.normaliser == "none" else normalise(read)
    # The later tokens: backwards, read before writing and decay after it.
    g = None if x.g is None else x.g.flip(2)
    k = x.k.flip(2)
    if gate is None:
        assert g is not None
        back = Flow(x.q.flip(2), k * g.exp(), x.v.flip(2), g, exclusive=True)
        read = scan(x)[0] + scan(back)[0].flip(2)
        return read if spec.normaliser == "none" else normalise(read)
    back = Flow(x.q.flip(2), k, x.v.flip(2), g, exclusive=True)
    back_gate = gate.flip(2) if g is None else gate.flip(2) + g.squeeze(-1)
    ahead, _, top, _ = _scan_max(x, gate, None, None)
    behind, _, back_top, _ = _scan_max(back, back_gate, None, None)
    back_top = back_top.flip(2)
    both = torch.maximum(top, back_top)
    finite = torch.where(both == -torch.inf, 0.0, both)
    read = ahead * _readers((top - finite).exp(), x).unsqueeze(-1)
    read = read + behind.flip(2) * _readers((back_top - finite).exp(), x).unsqueeze(-1)
    return normalise_max(read, _readers(both, x))
