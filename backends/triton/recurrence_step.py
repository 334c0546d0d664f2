"""The recurrence token by token: decoding, and the untied correction at any length.

Every kind is one kernel of the general step (catalogue: linear.md section 1).
"""

from __future__ import annotations

from torch import Tensor

from rewriter.backends.triton.chunks import block, dense, per_token, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_forward import Call

LONGEST = 8  # tokens for which a walk costs less than cutting into chunks (not timed on a GPU)


def walk(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in the dtype of v and end states (rows, Hkv, Dk, width), float32."""
    spec, x, size = call.spec, call.x, call.size
    start = None if x.start is None else x.start.float().contiguous()
    module = emit(
        "recurrence_step",
        decay=spec.decay,
        correction=spec.correction,
        bonus=spec.bonus,
        ones=call.ones,
        read_kind=spec.read,
        start=start is not None,
        packed=call.packed,
    )
    out = x.v.new_empty((size.batch, size.heads, size.length, spec.value_dim))
    end = call.float32(size.rows, size.kv_heads, spec.key_dim, spec.state_width)
    decay = per_token(spec, x, size)
    given: dict[str, Tensor] = {}
    for name, t in (("beta", x.beta), ("erase", x.erase), ("add", x.add)):
        if t is not None:
            given[name] = dense(t) if t.dim() == 4 else t
    if decay is not None:
        given["decay"] = decay
    places = {k: s for name, t in given.items() for k, s in strides(name, t).items()}
    if spec.decay == "channel" and decay is not None:
        places["decay_d"] = decay.stride(3)
    chosen = call.config("step", spec.key_dim)
    cols = block(spec.value_dim, chosen.values)
    call.run(
        Launch(
            module.step,
            (-(-spec.value_dim // cols), size.rows * size.kv_heads),
            {
                "q": x.q,
                "k": x.k,
                "v": x.v,
                **given,
                **({} if x.bonus is None else {"bonus": x.bonus.contiguous()}),
                **({} if start is None else {"start": start}),
                **({} if size.table is None else {"cuts": size.table.cuts}),
                "out": out,
                "end": end,
                **strides("q", x.q),
                **strides("k", x.k),
                **strides("v", x.v),
                **places,
                "heads": size.heads,
                "group": size.group,
                "length": size.length,
                "scale": spec.scale,
            },
            {
                "DK": spec.key_dim,
                "DV": spec.value_dim,
                "W": spec.state_width,
                "BK": block(spec.key_dim, 256),
                "BV": cols,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    return out, end
