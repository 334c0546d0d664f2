"""What the forward and the backward kernels of `BlockSparse` are given: lists and hooks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs
from rewriter.backends.schedule import Schedule, schedule, transpose
from rewriter.backends.triton.chunks import dense
from rewriter.backends.triton.launch import Runner
from rewriter.backends.triton.predicate import printed, table_tensors
from rewriter.backends.triton.targets import Target
from rewriter.ir.block_sparse import BlockSparse

Args = dict[str, Tensor | int | float]


@dataclass(frozen=True)
class Features:
    """What a kernel file is specialised to; the templates read these names."""

    predicate: str | None
    tables: int
    softcap: float | None
    weight: str
    sinks: bool
    slopes: bool
    bias: bool
    temperature: bool
    key_lengths: bool
    packed: bool
    listed: bool
    by_head: bool
    unmasked: bool
    precision: str
    backward: bool = False
    shared_bias: bool = False


class Lists(NamedTuple):
    """Blocks to visit for each line (a query block, or a key block when transposed), int32.

    `full` ones need no mask. `starts` are (1 | heads, lines + 1).
    """

    full_starts: Tensor
    full_blocks: Tensor
    part_starts: Tensor
    part_blocks: Tensor
    lines: int


@dataclass(frozen=True)
class AttentionCall:
    """A BlockSparse call. `run` launches a kernel; `target` chooses its configuration."""

    spec: BlockSparse
    x: BlockSparseInputs
    run: Runner
    target: Target

    @classmethod
    def of(
        cls, spec: BlockSparse, x: BlockSparseInputs, run: Runner, target: Target
    ) -> AttentionCall:
        x = BlockSparseInputs(**{**x.__dict__, "q": dense(x.q), "k": dense(x.k), "v": dense(x.v)})
        return cls(spec, x, run, target)

    @property
    def device(self) -> torch.device:
        return self.x.q.device

    @property
    def listed(self) -> bool:
        return self.x.blocks is not None

    def features(self, backward: bool = False) -> Features:
        spec, x = self.spec, self.x
        mask = printed(spec.mask)
        masked = x.key_lengths is not None or x.cu_seqlens is not None or self.listed
        bias = x.bias
        shared = bias is not None and bias.shape[:2] != x.q.shape[:2]
        return Features(
            predicate=mask.text,
            tables=len(mask.tables),
            softcap=spec.softcap,
            weight=spec.weight,
            sinks=x.sinks is not None,
            slopes=x.slopes is not None,
            bias=bias is not None,
            temperature=x.temperature is not None,
            key_lengths=x.key_lengths is not None,
            packed=x.cu_seqlens is not None,
            listed=self.listed,
            by_head=mask.text is not None and self._by_head(),
            unmasked=not masked,
            precision="ieee",
            backward=backward,
            shared_bias=shared,
        )

    def _by_head(self) -> bool:
        return bool({str(s) for s in self.spec.mask.free_symbols} & {"h"})

    def lists(self, rows: int, keys: int, transposed: bool = False) -> Lists:
        """Static lists of this call's predicate for a tile size, on its device."""
        masked = self.x.key_lengths is not None or self.x.cu_seqlens is not None
        M, N, H = self.x.q.shape[2], self.x.k.shape[2], self.x.q.shape[1]
        made = schedule(self.spec.mask, M, N, H, rows, keys, self.spec.offset)
        return _lists(made, masked, transposed, self.device)

    def hooks(self) -> Args:
        """Arguments of the score hooks, by parameter name."""
        spec, x = self.spec, self.x
        out: Args = {}
        if x.slopes is not None:
            out["slopes"] = x.slopes.contiguous()
        if x.temperature is not None:
            out["temperature"] = x.temperature.float().contiguous()
        if x.bias is not None:
            out["bias"] = x.bias
            out.update(bias_strides(x.bias))
        if x.key_lengths is not None:
            out["key_lengths"] = x.key_lengths.to(torch.int32).contiguous()
        if x.cu_seqlens is not None:
            length = max(x.q.shape[2] + spec.offset, x.k.shape[2])
            out["segments"] = segments(x.cu_seqlens, length)
        return {**out, **table_tensors(spec.mask, self.device)}


def bias_strides(bias: Tensor) -> dict[str, int]:
    """Strides of a (1|B, 1|H, M, N) bias, 0 along an axis that is shared."""
    values = [0 if n == 1 else s for n, s in zip(bias.shape[:2], bias.stride()[:2], strict=True)]
    names = ("bias_b", "bias_h", "bias_m", "bias_n")
    return dict(zip(names, (*values, *bias.stride()[2:]), strict=True))


def segments(cuts: Tensor, length: int) -> Tensor:
    """(length,) int32: number of the packed sequence of each position, -1 outside of all."""
    cuts = cuts.to(torch.int32).contiguous()
    at = torch.arange(length, device=cuts.device, dtype=torch.int32)
    number = torch.searchsorted(cuts, at, right=True, out_int32=True) - 1
    return torch.where(number >= cuts.shape[0] - 1, -1, number).to(torch.int32)


@lru_cache(maxsize=128)
def _lists(made: Schedule, masked: bool, transposed: bool, device: torch.device) -> Lists:
    keys = made.blocks
    if transposed:
        made = transpose(made)
        starts = made.starts
        lines = torch.arange(starts.numel() - starts.shape[0]) % (starts.shape[1] - 1)
        keys = torch.repeat_interleave(lines, starts.diff(dim=1).flatten().long())
    ragged = (keys + 1) * made.block_k > made.N
    full = made.full.bool() & ~ragged
    if masked:
        full = torch.zeros_like(full)
    full_starts, full_blocks = _kept(made, full, device)
    part_starts, part_blocks = _kept(made, ~full, device)
    return Lists(full_starts, full_blocks, part_starts, part_blocks, made.starts.shape[1] - 1)


def _kept(made: Schedule, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    before = torch.cat((torch.zeros(1, dtype=torch.long), chosen.long().cumsum(0)))
    blocks = made.blocks[chosen]
    # An empty list still needs an address.
    starts = before[made.starts.long()].to(torch.int32)
    return starts.to(device), torch.cat((blocks, blocks.new_zeros(1))).to(device)
