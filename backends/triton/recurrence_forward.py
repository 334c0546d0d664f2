"""The chunked forward pass of a recurrence: decay sums, states, outputs.

The state pass keeps a tile of the state in registers and walks the chunks of one sequence; it
stores the state before each chunk. The output pass then treats all chunks at once. What was
stored serves the backward pass too. Catalogue: linear.md section 2 (LIN-S, LIN-V, DELTA, GLOBAL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.triton.chunks import Sizes, block, per_token, sizes, strides, unit_stride
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch, Runner
from rewriter.backends.triton.targets import CHUNK, Config, Target, config
from rewriter.ir.recurrence import Recurrence


@dataclass(frozen=True)
class Call:
    """A recurrence call and the passes that were made for it so far.

    Attributes:
        spec, x, size: what to compute.
        run: launches a kernel.
        target: whose configurations are used.
    """

    spec: Recurrence
    x: RecurrenceInputs
    size: Sizes
    run: Runner
    target: Target

    @classmethod
    def of(cls, spec: Recurrence, x: RecurrenceInputs, run: Runner, target: Target) -> Call:
        x = unit_stride(x)
        return cls(spec, x, sizes(x), run, target)

    @property
    def packed(self) -> bool:
        return self.size.table is not None

    @property
    def ones(self) -> bool:
        return self.spec.normaliser == "ones"

    @property
    def exclusive(self) -> bool:
        return self.spec.read == "exclusive"

    @property
    def precision(self) -> str:
        return "ieee"

    def config(self, kernel: str, dim: int | None = None) -> Config:
        largest = max(self.spec.key_dim, self.spec.value_dim)
        return config(kernel, self.target, dim or largest, self.x.v.dtype == torch.float32)

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.v.device)


@dataclass(frozen=True)
class Sums:
    """Running sums of the log decay in each chunk, float32, (B, Hkv, N) or (B, Hkv, N, Dk).

    `written` includes the token's own decay; `reach` is what a read uses: the same tensor, or
    without the token's own decay for an exclusive read.
    """

    written: Tensor
    reach: Tensor


@dataclass(frozen=True)
class States:
    """State before each chunk, (B, Hkv, slots, Dk, Dv) in the dtype of v, and after the last."""

    kept: Tensor
    kept_norm: Tensor | None
    end: Tensor


def decay_sums(call: Call) -> Sums | None:
    spec, size = call.spec, call.size
    decay = per_token(spec, call.x, size)
    if decay is None:
        return None
    channel = spec.decay == "channel"
    module = emit(
        "recurrence_prefix", channel=channel, exclusive=call.exclusive, packed=call.packed
    )
    written = call.float32(*decay.shape)
    reach = call.float32(*decay.shape) if call.exclusive else written
    blocks = (spec.key_dim + 31) // 32 if channel else 1
    call.run(
        Launch(
            module.prefix,
            (size.slots, size.batch * size.kv_heads, blocks),
            {
                "decay": decay,
                "written": written,
                **({"reach": reach} if call.exclusive else {}),
                **size.chunk_args(),
                **strides("stride", decay),
                **({"stride_d": decay.stride(3)} if channel else {}),
                "heads": size.kv_heads,
                "length": size.length,
            },
            {"C": CHUNK, **({"D": spec.key_dim, "BD": 32} if channel else {})},
        )
    )
    return Sums(written, reach)


def chunk_states(
    call: Call,
    sums: Sums | None,
    values: Tensor | None = None,
    wash: Tensor | None = None,
    fresh: Tensor | None = None,
) -> States:
    """Walk the chunks. With a delta rule `values`, `wash` and `fresh` are U, W and U - W S."""
    spec, x, size = call.spec, call.x, call.size
    start = None if x.start is None else x.start.float().contiguous()
    features = {
        "decay": spec.decay,
        "delta": wash is not None,
        "ones": call.ones,
        "start": start is not None,
        "packed": call.packed,
        "precision": call.precision,
    }
    module = emit("recurrence_states", **features)
    v = x.v if values is None else values
    lanes = (size.batch, size.kv_heads, size.slots)
    kept = v.new_empty((*lanes, spec.key_dim, spec.value_dim))
    norm = call.float32(*lanes, spec.key_dim) if call.ones else None
    end = call.float32(size.rows, size.kv_heads, spec.key_dim, spec.state_width)
    chosen = call.config("delta_states" if wash is not None else "states")
    keys = block(spec.key_dim, 256 if wash is not None else chosen.keys)
    cols = block(spec.value_dim, chosen.values)
    call.run(
        Launch(
            module.states,
            (-(-spec.key_dim // keys), -(-spec.value_dim // cols), size.rows * size.kv_heads),
            {
                "k": x.k,
                "v": v,
                **({} if sums is None else {"written": sums.written}),
                **({} if wash is None or fresh is None else {"wash": wash, "fresh": fresh}),
                **({} if start is None else {"start": start}),
                "kept": kept,
                **({} if norm is None else {"kept_norm": norm}),
                "end": end,
                **({} if size.table is None else {"cuts": size.table.cuts}),
                **strides("k", x.k),
                **strides("v", v),
                "heads": size.kv_heads,
                "length": size.length,
                "slots": size.slots,
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
    return States(kept, norm, end)


def read_outputs(
    call: Call,
    sums: Sums | None,
    states: States,
    values: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, H, N, Dv) and, with a normaliser, what they were divided by (B, H, N)."""
    spec, x, size = call.spec, call.x, call.size
    kept, norm = states.kept, states.kept_norm
    if not spec.causal:
        kept = states.end[..., : spec.value_dim].contiguous()
        norm = states.end[..., spec.value_dim].contiguous() if call.ones else None
    module = emit(
        "recurrence_outputs",
        decay=spec.decay,
        ones=call.ones,
        bonus=spec.bonus,
        exclusive=call.exclusive,
        causal=spec.causal,
        scores=scores is not None,
        packed=call.packed,
        precision=call.precision,
    )
    v = x.v if values is None else values
    out = x.v.new_empty((size.batch, size.heads, size.length, spec.value_dim))
    weight = call.float32(size.batch, size.heads, size.length) if call.ones else None
    chosen = call.config("outputs")
    cols = block(spec.value_dim, chosen.values)
    owners = size.table is not None and not spec.causal
    call.run(
        Launch(
            module.outputs,
            (size.slots, -(-spec.value_dim // cols), size.batch * size.heads),
            {
                "q": x.q,
                "k": x.k,
                "v": v,
                "kept": kept,
                **({} if norm is None or weight is None else {"kept_norm": norm, "weight": weight}),
                **({} if sums is None else {"reach": sums.reach, "written": sums.written}),
                **({} if scores is None else {"scores": scores}),
                **({} if x.bonus is None else {"bonus": x.bonus.contiguous()}),
                "out": out,
                **size.chunk_args(),
                **({"owners": size.table.owners} if owners and size.table else {}),
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
                "BK": block(spec.key_dim, chosen.keys),
                "BV": cols,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    return out, weight
