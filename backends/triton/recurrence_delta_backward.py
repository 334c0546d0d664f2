"""Gradients of the delta rule in chunks.

Its outputs and states are those of a plain recurrence over the written values U - W S; their
gradient comes from both and goes back through the triangular system, where K K^T counts as scores
of the keys with themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rewriter.backends.inputs import RecurrenceGrads
from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_backstates import Cotangents, Written, back_states
from rewriter.backends.triton.recurrence_backward import (
    decay_gradient,
    inside_chunks,
    queries_and_keys,
    value_gradients,
)
from rewriter.backends.triton.recurrence_delta import Solved, solve
from rewriter.backends.triton.recurrence_forward import Call, Sums, decay_sums
from rewriter.backends.triton.recurrence_pairs import through_scores
from rewriter.backends.triton.recurrence_scores import query_scores
from rewriter.backends.triton.targets import CHUNK


def delta_gradients(call: Call, given: Cotangents) -> RecurrenceGrads:
    """Gradients of the inputs of a delta rule without a bonus."""
    sums = decay_sums(call)
    solved = solve(call, sums)
    local = value_gradients(call, sums, None, given, query_scores(call, sums))
    whole = local.new_empty(local.shape)
    later, grad_start = back_states(call, sums, given, Written(solved.wash, local, whole))
    parts = queries_and_keys(call, sums, solved.states, later, given, solved.fresh)
    if call.spec.decay == "channel" and sums is not None:
        parts = inside_chunks(call, sums, given, parts, solved.fresh)
    back = _unsolve(call, sums, solved, whole)
    k, reach, written = parts.k.float() + back.k, parts.reach, parts.written
    if written is not None and back.written is not None:
        written = written + back.written
    if sums is not None and back.products is not None and written is not None:
        more = through_scores(call, sums, call.x.k, sums.written, back.products, strict=True)
        k = k + more.k + more.left
        written = written + more.reach + more.written
    return RecurrenceGrads(
        parts.q,
        k,
        back.v,
        decay_gradient(call, reach, written),
        beta=back.beta,
        start=None if call.x.start is None else grad_start,
    )


@dataclass(frozen=True)
class _Back:
    k: Tensor
    v: Tensor
    beta: Tensor
    written: Tensor | None
    products: Tensor | None


def _unsolve(call: Call, sums: Sums | None, solved: Solved, grad_fresh: Tensor) -> _Back:
    spec, x, size = call.spec, call.x, call.size
    assert x.beta is not None
    module = emit(
        "recurrence_solve_backward",
        decay=spec.decay,
        packed=call.packed,
        precision=call.precision,
    )
    kv = (size.batch, size.kv_heads, size.length)
    out = _Back(
        call.float32(*kv, spec.key_dim),
        x.v.new_empty((*kv, spec.value_dim)),
        call.float32(*kv),
        None if sums is None else call.float32(*sums.written.shape),
        call.float32(*kv, CHUNK) if spec.decay == "channel" else None,
    )
    args: dict[str, Tensor] = {
        "k": x.k,
        "v": x.v,
        "beta": x.beta,
        "inverse": solved.inverse,
        "products": solved.products,
        "wash": solved.wash,
        "mixed": solved.mixed,
        "grad_fresh": grad_fresh,
        "kept": solved.states.kept,
        "grad_k": out.k,
        "grad_v": out.v,
        "grad_beta": out.beta,
    }
    if sums is not None and out.written is not None:
        args.update(written=sums.written, grad_written=out.written)
    if out.products is not None:
        args["grad_products"] = out.products
    chosen = call.config("unsolve")
    call.run(
        Launch(
            module.unsolve,
            (size.slots, size.batch * size.kv_heads),
            {
                **args,
                **size.chunk_args(),
                **strides("k", x.k),
                **strides("v", x.v),
                **strides("beta", x.beta),
                "heads": size.kv_heads,
                "length": size.length,
                "slots": size.slots,
            },
            {
                "DK": spec.key_dim,
                "DV": spec.value_dim,
                "C": CHUNK,
                "BK": block(spec.key_dim, chosen.keys),
                "BV": block(spec.value_dim, chosen.values),
            },
            chosen.warps,
            chosen.stages,
        )
    )
    return out
