"""The tensors of a `BlockSparse` call as its C++ kernels read them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.backends.cpu.attention_units import Kernel, Packing
from rewriter.backends.inputs import BlockSparseGrads, BlockSparseInputs
from rewriter.backends.schedule import schedule
from rewriter.ir.block_sparse import BlockSparse

_ROOM = 2**20  # bytes of tiles that stay near
_TURNS = 4  # tasks of a thread between two times that all wait for one another


class Call:
    """The tensors of a call as the kernel reads them. It keeps them alive while the kernel runs."""

    def __init__(self, spec: BlockSparse, x: BlockSparseInputs, kernel: Kernel) -> None:
        self.q, self.k, self.v = (_unit_columns(t) for t in (x.q, x.k, x.v))
        self.hooks = [_floats(t) for t in (x.sinks, x.slopes, x.temperature)]
        self.bias = None if x.bias is None else _unit_columns(x.bias.float())
        self.lengths = [_ints(t) for t in (x.key_lengths, x.cu_seqlens, x.blocks)]
        self.tables = _pack(*(t.data_ptr() for t in kernel.tables))
        B, H, M, _ = self.q.shape
        N = self.k.shape[2]
        self.sizes = (B, H, self.k.shape[1], M, N)
        block_q, block_k = (spec.block, spec.block) if spec.block else (kernel.rows, kernel.keys)
        self.plan = schedule(spec.mask, M, N, H, block_q, block_k, spec.offset)
        self.threads, self.scale = torch.get_num_threads(), spec.scale
        rows = self.plan.starts.shape[1] - 1
        self.tasks = rows * -(-block_q // kernel.rows)
        self.marks, self.slots = None, 0
        self.packing = kernel.packing
        self.ready: tuple[_Rows, _Rows]
        if kernel.packing == "gradient tiles":
            self.slots, self.ready = _gradient_tiles(self.k, self.v, self.threads)
            return
        if kernel.packing == "tiles":
            self.marks = torch.empty((*x.k.shape[:2], -(-N // 32)), dtype=torch.uint8)
            self.slots = _slots(self.k, self.v, self.threads, self.tasks)
        self.ready = (
            _keys(self.k, kernel.packing, self.slots),
            _values(self.v, kernel.packing, self.slots),
        )

    def fields(self, out: Tensor, lse: Tensor, top: Tensor | None = None) -> array[int]:
        """The struct `Call`: its fields in their order."""
        s, k, v = self.plan, *self.ready
        cu, lists = self.lengths[1], self.lengths[2]
        bias = (0, 0, 0) if self.bias is None else _broadcast_strides(self.bias)
        return _pack(
            *(t.data_ptr() for t in (self.q, self.k, self.v, out, lse)),
            _pointer(top),
            *(_pointer(t) for t in (*self.hooks, self.bias, *self.lengths)),
            *(t.data_ptr() for t in (s.starts, s.blocks, s.full)),
            address(self.tables),
            *(k.data.data_ptr(), v.data.data_ptr(), _pointer(self.marks), k.copied, v.copied),
            self.slots,
            *self.sizes,
            *(n for t in (self.q, self.k, self.v) for n in t.stride()[:3]),
            *(*k.strides, *v.strides, *bias),
            *(0 if cu is None else cu.numel() - 1, 0 if lists is None else lists.shape[-1]),
            *(s.starts.shape[0], s.starts.shape[1] - 1, s.block_q, s.block_k, s.offset),
            self.threads,
        )


class GradBuffers:
    """Where the backward kernel writes."""

    def __init__(
        self, spec: BlockSparse, x: BlockSparseInputs, call: Call, grad_out: Tensor
    ) -> None:
        self.x, self.call = x, call
        self.grad_out = _unit_columns(grad_out.to(x.v.dtype))
        B, H, Hkv, M, N = call.sizes
        floats = torch.float32
        self.dq, self.dk, self.dv = (torch.empty(t.shape, dtype=x.v.dtype) for t in (x.q, x.k, x.v))
        self.delta = torch.empty((B, H, M), dtype=floats)
        self.temperature = torch.empty((B, H, M), dtype=floats) if spec.temperature else None
        self.slopes = torch.empty((B, H, call.tasks), dtype=floats) if spec.slopes else None
        self.bias = torch.zeros(x.bias.shape, dtype=floats) if x.bias is not None else None
        # Gradients of one key come from many rows: each slice of the rows has sums of its own.
        units = B * Hkv
        self.slices = 1 if units % call.threads == 0 else -(-2 * call.threads // units)
        unit = 32 if call.packing == "gradient tiles" else 1  # sums of whole tiles
        sizes = [(_round_up(N, unit), _round_up(g.shape[-1], unit)) for g in (self.dk, self.dv)]
        fits = all(g.shape[2:] == size for g, size in zip((self.dk, self.dv), sizes, strict=True))
        self.direct = self.slices == 1 and x.v.dtype == floats and fits
        self.sums = tuple(
            g if self.direct else torch.empty((B, Hkv, self.slices, *size), dtype=floats)
            for g, size in zip((self.dk, self.dv), sizes, strict=True)
        )

    def fields(self) -> array[int]:
        """The struct `Grads`: its fields in their order."""
        B, H, _, M, N = self.call.sizes
        bias = (0, 0, 0)
        if self.bias is not None:
            rows, heads, _, _ = self.bias.shape
            strides = (0 if rows == 1 else heads * M * N, 0 if heads == 1 else M * N)
            bias = (*strides, rows < B or heads < H)
        return _pack(
            *(self.grad_out.data_ptr(), *self.grad_out.stride()[:3]),
            *(t.data_ptr() for t in (self.dq, self.dk, self.dv, self.delta)),
            *(_pointer(t) for t in (self.temperature, self.slopes, self.bias)),
            *bias,
            *(t.data_ptr() for t in self.sums),
            *(self.slices, self.direct),
        )

    def results(self, lse: Tensor) -> BlockSparseGrads:
        """The gradients, once the kernel has run."""
        x = self.x
        sinks = None
        if x.sinks is not None:
            # A sink has value 0, so its gradient is its weight times -delta.
            weight = torch.exp(x.sinks.float()[:, None] - lse)
            sinks = -(weight * self.delta).sum((0, 2))
        return BlockSparseGrads(
            *(self.dq, self.dk, self.dv, sinks),
            None if self.slopes is None else self.slopes.sum((0, 2)),
            self.bias,
            None if self.temperature is None else self.temperature.sum(0) * self.call.scale,
        )


@dataclass(frozen=True)
class _Rows:
    """Rows without gaps: where they are, whether the kernel copies them there, strides (b, h)."""

    data: Tensor
    copied: bool
    strides: tuple[int, int]


def _keys(x: Tensor, packing: Packing, slots: int) -> _Rows:
    if packing == "tiles":  # rows of a multiple of 32 numbers, a multiple of 32 of them
        N, D = x.shape[2:]
        whole = N % 32 == 0 and D % 32 == 0 and x.stride(2) == D
        if whole and x.dtype == torch.bfloat16:
            return _Rows(x, False, (x.stride(0), x.stride(1)))
        return _tiles(x, slots)
    if packing == "rows":
        return _rows(x)
    (b, h, n, _), (N, D) = x.stride(), x.shape[2:]
    if (n == D or N == 1) and b % 2 == h % 2 == 0:
        return _Rows(x, False, (b // 2, h // 2))
    return _buffer(x, N * D // 2, torch.int32)


def _values(x: Tensor, packing: Packing, slots: int) -> _Rows:
    N, D = x.shape[2:]
    if packing == "tiles":  # tiles of 16 columns, two by two, by 32 keys
        return _tiles(x, slots)
    if packing == "pairs":
        return _buffer(x, -(-N // 2) * D, torch.int32)
    return _rows(x)


def _rows(x: Tensor) -> _Rows:
    N, D = x.shape[2:]
    if x.dtype == torch.float32 and (x.stride(2) == D or N == 1):
        return _Rows(x, False, (x.stride(0), x.stride(1)))
    return _buffer(x, N * D, torch.float32)


def _tiles(x: Tensor, slots: int) -> _Rows:
    """Room for the tiles of `slots` heads, which follow one another."""
    count = _tile_numbers(x)
    return _Rows(torch.empty(slots * count, dtype=torch.bfloat16), True, (0, count))


def _gradient_tiles(k: Tensor, v: Tensor, threads: int) -> tuple[int, tuple[_Rows, _Rows]]:
    """How many heads are held at a time, and room for the tiles of their K, K^T and V."""
    count = 2 * _tile_numbers(k) + _tile_numbers(v)
    fitting = _ROOM // (2 * max(1, count)) // threads * threads
    slots = min(k.shape[0] * k.shape[1], max(threads, fitting))
    data = torch.empty(slots * count, dtype=torch.bfloat16)
    return slots, (_Rows(data, True, (0, count)), _Rows(data[:0], False, (0, 0)))


def _tile_numbers(x: Tensor) -> int:
    """Of a head: whole tiles of 32 by 32 numbers; a float32 number is three of bfloat16."""
    N, D = x.shape[2:]
    parts = 3 if x.dtype == torch.float32 else 1
    return _round_up(N, 32) * _round_up(D, 32) * parts


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _slots(k: Tensor, v: Tensor, threads: int, tasks: int) -> int:
    """Heads whose tiles are held at a time: what the second cache holds, enough for all threads."""
    heads = k.shape[0] * k.shape[1]
    fitting = _ROOM // (2 * max(1, _tile_numbers(k) + _tile_numbers(v)))
    return max(1, min(heads, max(fitting, -(-_TURNS * threads // max(1, tasks)))))


def _buffer(x: Tensor, count: int, dtype: torch.dtype) -> _Rows:
    """Room for `count` numbers of each head."""
    B, H = x.shape[:2]
    return _Rows(torch.empty(B * H * count, dtype=dtype), True, (H * count, count))


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _broadcast_strides(x: Tensor) -> tuple[int, int, int]:
    b, h, m, _ = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return b, h, m


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _ints(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _pack(*values: int) -> array[int]:
    return array("q", values)


def address(fields: array[int]) -> int:
    """Where the struct lies; it must outlive the call."""
    return fields.buffer_info()[0]


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
