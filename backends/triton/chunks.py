"""The sizes of a recurrence call, and how its tokens are cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.triton.targets import CHUNK
from rewriter.ir.recurrence import Recurrence


class Table(NamedTuple):
    """Chunks of packed sequences, int32 each; a chunk without tokens is 0 .. 0.

    Sequence s owns the slots from cuts[s] // CHUNK + s on, which never overlap, so the table needs
    no transfer from the device.
    """

    starts: Tensor
    stops: Tensor
    owners: Tensor
    cuts: Tensor


@dataclass(frozen=True)
class Sizes:
    """Shapes of a call.

    Attributes:
        batch, heads, kv_heads, length: of q and k.
        slots: chunks of a row, an upper bound when packed.
        rows: sequences: B, or those packed in the one row.
        table: the chunks of a packed call.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    slots: int
    rows: int
    table: Table | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def chunk_args(self) -> dict[str, Tensor | int | float]:
        """Arguments that tell a chunk-parallel kernel where its chunks lie."""
        if self.table is None:
            return {}
        return {"starts": self.table.starts, "stops": self.table.stops}


def sizes(x: RecurrenceInputs) -> Sizes:
    """Sizes of a call; inputs are (B, H, N, D)."""
    batch, heads, length, _ = x.q.shape
    kv_heads = x.k.shape[1]
    if x.cu_seqlens is None:
        slots = -(-length // CHUNK)
        return Sizes(batch, heads, kv_heads, length, slots, batch, None)
    rows = x.cu_seqlens.shape[0] - 1
    slots = length // CHUNK + rows
    return Sizes(batch, heads, kv_heads, length, slots, rows, _table(x.cu_seqlens, slots))


def _table(cuts: Tensor, slots: int) -> Table:
    cuts = cuts.to(torch.int32).contiguous()
    rows = cuts.shape[0] - 1
    first = cuts[:-1] // CHUNK + torch.arange(rows, device=cuts.device, dtype=torch.int32)
    slot = torch.arange(slots, device=cuts.device, dtype=torch.int32)
    owners = torch.searchsorted(first, slot, right=True, out_int32=True) - 1
    starts = cuts[owners] + (slot - first[owners]) * CHUNK
    stops = torch.minimum(starts + CHUNK, cuts[owners + 1])
    some = starts < stops
    starts, stops = torch.where(some, starts, 0), torch.where(some, stops, 0)
    return Table(starts, stops, owners.to(torch.int32), cuts)


def unit_stride(x: RecurrenceInputs) -> RecurrenceInputs:
    """The same inputs with channels next to each other; the kernels take any other stride."""
    rows = {n: dense(getattr(x, n)) for n in ("q", "k", "v")}
    return replace(x, **rows)


def dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def strides(name: str, t: Tensor) -> dict[str, int]:
    """Strides of (B, H, N, D) without the last, by parameter name."""
    return {f"{name}_b": t.stride(0), f"{name}_h": t.stride(1), f"{name}_n": t.stride(2)}


def per_token(spec: Recurrence, x: RecurrenceInputs, size: Sizes) -> Tensor | None:
    """Log decay as (B, Hkv, N) or (B, Hkv, N, Dk); a constant per head is a view."""
    if spec.decay == "head" and x.decay is not None:
        return x.decay[None, :, None].expand(size.batch, size.kv_heads, size.length)
    return x.decay


def block(dim: int, largest: int) -> int:
    """Smallest power of two that holds `dim`, within 16 and `largest`."""
    return max(16, min(largest, 1 << (dim - 1).bit_length()))
