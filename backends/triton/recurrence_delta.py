"""The delta rule in chunks: solve for what the tokens of a chunk really write.

T = (I + M)^-1 with M the strictly lower part of beta (K K^T under the decay), W = T (beta exp(b) K)
and U = T (beta V); the state pass then forms the written values U - W S. T stays in float32.
Catalogue: linear.md section 2 (DELTA).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor

from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_forward import Call, States, Sums, chunk_states
from rewriter.backends.triton.recurrence_scores import channel_scores
from rewriter.backends.triton.targets import CHUNK


@dataclass(frozen=True)
class Solved:
    """W (B, Hkv, N, Dk), the written values U - W S (B, Hkv, N, Dv), and the states they give.

    `mixed` is U, `products` are the strictly lower decayed K K^T and `inverse` is T, each
    (B, Hkv, N, CHUNK) float32.
    """

    wash: Tensor
    mixed: Tensor
    fresh: Tensor
    states: States
    products: Tensor
    inverse: Tensor


def solve(call: Call, sums: Sums | None) -> Solved:
    """Solve every chunk, then walk the states."""
    spec, x, size = call.spec, call.x, call.size
    assert x.beta is not None
    module = emit(
        "recurrence_solve",
        decay=spec.decay,
        packed=call.packed,
        precision=call.precision,
    )
    kv = (size.batch, size.kv_heads, size.length)
    wash = x.k.new_empty((*kv, spec.key_dim))
    mixed = x.v.new_empty((*kv, spec.value_dim))
    inverse = call.float32(*kv, CHUNK)
    table = {**size.chunk_args(), "heads": size.kv_heads, "length": size.length}
    strengths = strides("beta", x.beta)
    products = _products(call, sums, module)
    call.run(
        Launch(
            module.invert,
            (size.slots, size.batch * size.kv_heads),
            {"beta": x.beta, "products": products, "inverse": inverse, **table, **strengths},
            {"C": CHUNK},
            warps=1,
        )
    )
    chosen = call.config("solve")
    call.run(
        Launch(
            module.solve,
            (size.slots, size.batch * size.kv_heads),
            {
                "k": x.k,
                "v": x.v,
                "beta": x.beta,
                "inverse": inverse,
                **({} if sums is None else {"written": sums.written}),
                "wash": wash,
                "mixed": mixed,
                **table,
                **strengths,
                **strides("k", x.k),
                **strides("v", x.v),
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
    fresh = x.v.new_empty((*kv, spec.value_dim))
    # An exclusive read moves only what rows reach, never what is written.
    plain = replace(call, spec=replace(spec, read="inclusive", bonus=False))
    states = chunk_states(plain, sums, mixed, wash, fresh)
    return Solved(wash, mixed, fresh, states, products, inverse)


def _products(call: Call, sums: Sums | None, module: ModuleType) -> Tensor:
    spec, x, size = call.spec, call.x, call.size
    if spec.decay == "channel" and sums is not None:
        return channel_scores(call, x.k, sums.written, sums, strict=True)
    out = call.float32(size.batch, size.kv_heads, size.length, CHUNK)
    chosen = call.config("gram")
    call.run(
        Launch(
            module.gram,
            (size.slots, size.batch * size.kv_heads),
            {
                "k": x.k,
                **({} if sums is None else {"written": sums.written}),
                "products": out,
                **size.chunk_args(),
                **strides("k", x.k),
                "heads": size.kv_heads,
                "length": size.length,
            },
            {"DK": spec.key_dim, "C": CHUNK, "BK": block(spec.key_dim, chosen.keys)},
            chosen.warps,
            chosen.stages,
        )
    )
    return out
