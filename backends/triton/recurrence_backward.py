"""Gradients of a recurrence: the states again, their gradients backwards, then all chunks at once.

What the forward pass divided by is treated as one more column of the values. Gradients of log
decays are sums over the rest of a chunk of q dq - k dk, which never leaves the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceGrads
from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_backstates import Cotangents, back_states
from rewriter.backends.triton.recurrence_forward import Call, States, Sums, chunk_states, decay_sums
from rewriter.backends.triton.recurrence_pairs import pair_gradients, through_scores
from rewriter.backends.triton.recurrence_scores import query_scores
from rewriter.backends.triton.targets import CHUNK


def divided(grad_out: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of numerator and denominator of out = numerator / weight; 0 where it is not."""
    inverse = torch.where(weight > 0, 1.0 / weight, 0.0)
    grad = grad_out.float() * inverse[..., None]
    mass = -(grad * out.float()).sum(-1)
    return grad.to(out.dtype).contiguous(), mass.contiguous()


def gradients(call: Call, given: Cotangents) -> RecurrenceGrads:
    """Gradients of the inputs of a causal call without a correction."""
    sums = decay_sums(call)
    states = chunk_states(call, sums)
    later, grad_start = back_states(call, sums, given)
    parts = queries_and_keys(call, sums, states, later, given)
    if call.spec.decay == "channel" and sums is not None:
        parts = inside_chunks(call, sums, given, parts)
    return RecurrenceGrads(
        parts.q,
        parts.k,
        value_gradients(call, sums, later, given, query_scores(call, sums)),
        None if sums is None else decay_gradient(call, parts.reach, parts.written),
        bonus=parts.bonus,
        start=None if call.x.start is None else grad_start,
    )


@dataclass(frozen=True)
class Parts:
    """Gradients of q, k and the bonus, and of the decay sums of rows and keys, float32."""

    q: Tensor
    k: Tensor
    reach: Tensor | None
    written: Tensor | None
    bonus: Tensor | None


def queries_and_keys(
    call: Call,
    sums: Sums | None,
    states: States,
    later: States,
    given: Cotangents,
    values: Tensor | None = None,
) -> Parts:
    """With a decay per channel q, k and the sums are float32 and lack the pairs in a chunk."""
    spec, x, size = call.spec, call.x, call.size
    channel = spec.decay == "channel"
    v = x.v if values is None else values
    chosen = call.config("channel_gradients" if channel else "queries_and_keys")
    keys, cols = block(spec.key_dim, chosen.keys), block(spec.value_dim, chosen.values)
    pieces = -(-spec.key_dim // keys)
    module = emit(
        "recurrence_gradients",
        decay=spec.decay,
        ones=call.ones,
        bonus=spec.bonus,
        exclusive=call.exclusive,
        packed=call.packed,
        local=False,
        precision=call.precision,
    )
    kind = torch.float32 if channel else x.q.dtype
    grad_q = torch.empty(x.q.shape, dtype=kind, device=x.q.device)
    grad_k = torch.empty(x.k.shape, dtype=kind, device=x.q.device)
    args: dict[str, Tensor] = {"q": x.q, "k": x.k, "v": v, "grad": given.out}
    if given.mass is not None and states.kept_norm is not None and later.kept_norm is not None:
        args["grad_mass"] = given.mass
        args["kept_norm"], args["later_norm"] = states.kept_norm, later.kept_norm
    reach = written = None
    if sums is not None:
        shape = sums.written.shape if channel else (pieces, *sums.written.shape)
        reach, written = call.float32(*shape), call.float32(*shape)
        args.update(reach=sums.reach, written=sums.written, grad_reach=reach, grad_written=written)
    bonus = None
    if x.bonus is not None:
        bonus = call.float32(size.batch, size.kv_heads, size.slots, spec.key_dim)
        args.update(bonus=x.bonus.contiguous(), grad_bonus=bonus)
    call.run(
        Launch(
            module.queries_and_keys,
            (size.slots, pieces, size.batch * size.kv_heads),
            {
                **args,
                "kept": states.kept,
                "later": later.kept,
                "grad_q": grad_q,
                "grad_k": grad_k,
                **size.chunk_args(),
                **strides("q", x.q),
                **strides("k", x.k),
                **strides("v", v),
                "heads": size.heads,
                "group": size.group,
                "length": size.length,
                "slots": size.slots,
                "scale": spec.scale,
            },
            {
                "DK": spec.key_dim,
                "DV": spec.value_dim,
                "C": CHUNK,
                "BK": keys,
                "BV": cols,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    if reach is not None and written is not None and not channel:
        reach, written = reach.sum(0), written.sum(0)
    return Parts(grad_q, grad_k, reach, written, None if bonus is None else bonus.sum((0, 2)))


def inside_chunks(
    call: Call, sums: Sums, given: Cotangents, parts: Parts, values: Tensor | None = None
) -> Parts:
    """Add the pairs within a chunk to what `queries_and_keys` left out."""
    x = call.x
    weights = pair_gradients(call, given.out, x.v if values is None else values, given.mass)
    more = through_scores(call, sums, x.q, sums.reach, weights, call.exclusive)
    assert parts.reach is not None and parts.written is not None
    return Parts(
        parts.q + more.left,
        parts.k + more.k,
        parts.reach + more.reach,
        parts.written + more.written,
        parts.bonus,
    )


def value_gradients(
    call: Call,
    sums: Sums | None,
    later: States | None,
    given: Cotangents,
    scores: Tensor | None = None,
) -> Tensor:
    """Gradient of v; without `later` only what comes from the outputs of the same chunk."""
    spec, x, size = call.spec, call.x, call.size
    module = emit(
        "recurrence_gradients",
        decay=spec.decay,
        ones=call.ones,
        bonus=spec.bonus,
        exclusive=call.exclusive,
        packed=call.packed,
        local=later is None,
        precision=call.precision,
    )
    chosen = call.config("values")
    cols = block(spec.value_dim, chosen.values)
    grad_v = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    call.run(
        Launch(
            module.values,
            (size.slots, -(-spec.value_dim // cols), size.batch * size.kv_heads),
            {
                "q": x.q,
                "k": x.k,
                "grad": given.out,
                **({} if sums is None else {"reach": sums.reach, "written": sums.written}),
                **({} if x.bonus is None else {"bonus": x.bonus.contiguous()}),
                **({} if scores is None else {"scores": scores}),
                **({} if later is None else {"later": later.kept}),
                "grad_v": grad_v,
                **size.chunk_args(),
                **strides("q", x.q),
                **strides("k", x.k),
                "heads": size.heads,
                "group": size.group,
                "length": size.length,
                "slots": size.slots,
                "scale": spec.scale,
            },
            {
                "DK": spec.key_dim,
                "DV": spec.value_dim,
                "C": CHUNK,
                "BK": block(spec.key_dim, chosen.keys),
                "BV": cols,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    return grad_v


def decay_gradient(call: Call, reach: Tensor | None, written: Tensor | None) -> Tensor | None:
    """Gradient of the log decay, of its shape, from those of its running sums."""
    spec, size = call.spec, call.size
    if reach is None or written is None:
        return None
    channel = spec.decay == "channel"
    module = emit(
        "recurrence_prefix", channel=channel, exclusive=call.exclusive, packed=call.packed
    )
    out = torch.empty_like(written)
    blocks = (spec.key_dim + 31) // 32 if channel else 1
    call.run(
        Launch(
            module.suffix,
            (size.slots, size.batch * size.kv_heads, blocks),
            {
                "grad_written": written,
                "grad_reach": reach,
                "grad_decay": out,
                **size.chunk_args(),
                "length": size.length,
            },
            {"C": CHUNK, **({"D": spec.key_dim, "BD": 32} if channel else {})},
        )
    )
    return out.sum((0, 2)) if spec.decay == "head" else out
