"""The backward walk over the states: the gradient of the state after every chunk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_forward import Call, States, Sums
from rewriter.backends.triton.targets import CHUNK


@dataclass(frozen=True)
class Cotangents:
    """Gradients that come in: of the sums before division, of what they are divided by, of the end.

    `out` is (B, H, N, Dv) in the dtype of v and contiguous, `mass` (B, H, N) float32.
    """

    out: Tensor
    mass: Tensor | None
    end: Tensor | None


@dataclass(frozen=True)
class Written:
    """Of a delta rule: W, the gradient of the written values from the outputs of their chunk, and
    where the whole gradient goes, (B, Hkv, N, Dk | Dv | Dv)."""

    wash: Tensor
    local: Tensor
    whole: Tensor


def back_states(
    call: Call, sums: Sums | None, given: Cotangents, written: Written | None = None
) -> tuple[States, Tensor]:
    """Gradient of the state after every chunk, laid out as `States`, and of the first state."""
    spec, x, size = call.spec, call.x, call.size
    end = None if given.end is None else given.end.float().contiguous()
    module = emit(
        "recurrence_backstates",
        decay=spec.decay,
        delta=written is not None,
        ones=call.ones,
        ended=end is not None,
        packed=call.packed,
        precision=call.precision,
    )
    lanes = (size.batch, size.kv_heads, size.slots)
    kept = given.out.new_empty((*lanes, spec.key_dim, spec.value_dim))
    norm = call.float32(*lanes, spec.key_dim) if call.ones else None
    start = call.float32(size.rows, size.kv_heads, spec.key_dim, spec.state_width)
    chosen = call.config("backstates" if written is None else "delta_backstates")
    keys = block(spec.key_dim, chosen.keys if written is None else 256)
    cols = block(spec.value_dim, chosen.values)
    call.run(
        Launch(
            module.backstates,
            (-(-spec.key_dim // keys), -(-spec.value_dim // cols), size.rows * size.kv_heads),
            {
                "q": x.q,
                "grad": given.out,
                **({} if given.mass is None else {"grad_mass": given.mass}),
                **({} if sums is None else {"reach": sums.reach, "written": sums.written}),
                **({} if written is None else _delta_args(call, written)),
                **({} if end is None else {"grad_end": end}),
                "kept": kept,
                **({} if norm is None else {"kept_norm": norm}),
                "grad_start": start,
                **({} if size.table is None else {"cuts": size.table.cuts}),
                **strides("q", x.q),
                "heads": size.heads,
                "group": size.group,
                "length": size.length,
                "slots": size.slots,
                "scale": spec.scale,
            },
            {
                "DK": spec.key_dim,
                "DV": spec.value_dim,
                "W": spec.state_width,
                "C": CHUNK,
                "BK": keys,
                "BV": cols,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    return States(kept, norm, start), start


def _delta_args(call: Call, written: Written) -> dict[str, Tensor | int]:
    return {
        "k": call.x.k,
        "wash": written.wash,
        "local": written.local,
        "grad_fresh": written.whole,
        **strides("k", call.x.k),
    }
