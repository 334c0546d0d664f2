"""The calls whose kernels are compiled ahead of time and checked: one per shipped feature set.

Values are bfloat16, H = 8 query heads on 2 key heads and N = 4096 tokens; sizes change no kernel,
apart from the divisibility by 16 that strides and lengths usually have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs, DecodeInputs, RecurrenceInputs
from rewriter.backends.triton import block_sparse, decode, recurrence
from rewriter.backends.triton.ahead import Resources, compiled, planned
from rewriter.backends.triton.launch import Launch, Runner
from rewriter.backends.triton.targets import TARGETS, Target
from rewriter.ir.block_sparse import BlockSparse, causal_window
from rewriter.ir.decode import Decode
from rewriter.ir.recurrence import Recurrence

HEADS, KV_HEADS, TOKENS = 8, 2, 4096
DIMS = (64, 128, 256)
Plan = Callable[[Runner, Target], object]

# Kernels that multiply no matrices, or only 16 x 16 float32 tiles.
PLAIN = frozenset({"prefix", "suffix", "step", "merge", "invert"})


@dataclass(frozen=True)
class Row:
    """One kernel of the table: `case` and `dim` name the call, `kernel` the function."""

    case: str
    dim: int
    kernel: str
    target: Target
    launch: Launch

    @property
    def key(self) -> str:
        return f"{self.case}/{self.dim}/{self.kernel}/{self.target.name}"

    def resources(self) -> Resources:
        return compiled(self.launch, self.target)

    def problem(self, found: Resources) -> str | None:
        """Why the kernel must not be shipped, or None."""
        return found.problem(self.target, self.kernel not in PLAIN)


def rows(keys: Collection[str] | None = None) -> Iterator[Row]:
    """Kernels of the shipped calls on all targets, each once per call: all, or those of `keys`."""
    calls = None if keys is None else {tuple(key.split("/")[:2]) for key in keys}
    for row in _rows(calls):
        if keys is None or row.key in keys:
            yield row


def _rows(calls: set[tuple[str, ...]] | None) -> Iterator[Row]:
    for dim in DIMS:
        for case, plan in cases(dim).items():
            if calls is not None and (case, str(dim)) not in calls:
                continue
            for target in TARGETS:
                seen: set[str] = set()
                for launch in planned(lambda run, p=plan, t=target: p(run, t)):  # type: ignore[misc]
                    if launch.name not in seen:
                        seen.add(launch.name)
                        yield Row(case, dim, launch.name, target, launch)


def cases(dim: int) -> dict[str, Plan]:
    """Calls by name, forward and backward."""
    out: dict[str, Plan] = {}
    recurrences = {
        "token decay": Recurrence(dim, dim, decay="token", normaliser="ones"),
        "channel decay": Recurrence(dim, dim, decay="channel", read="exclusive", bonus=True),
        "delta, token decay": Recurrence(dim, dim, decay="token", correction="delta"),
        "delta, channel decay": Recurrence(dim, dim, decay="channel", correction="delta"),
    }
    for name, spec in recurrences.items():
        if recurrence.decline(spec, torch.bfloat16, True) is None:
            out[name] = _recurrence(spec)
    walked = Recurrence(dim, dim, decay="channel", correction="untied")
    out["step"] = _walk(walked)
    hooks = BlockSparse(
        *(dim, dim, dim**-0.5, causal_window(512, 4)),
        softcap=30.0,
        sinks=True,
        slopes=True,
    )
    for name, attention in (
        ("causal attention", BlockSparse(dim, dim, dim**-0.5)),
        ("window attention with hooks", hooks),
        ("listed blocks", BlockSparse(dim, dim, dim**-0.5, mask=sympy.true, block=64)),
    ):
        out[name] = _attention(attention)
    out["decode"] = _decode(Decode(dim, dim, dim**-0.5))
    out["decode, paged"] = _decode(Decode(dim, dim, dim**-0.5, cache="paged", page=16))
    return out


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _qkv(dim: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    kv = (1, KV_HEADS, tokens, dim)
    return _meta(1, HEADS, tokens, dim), _meta(*kv), _meta(*kv)


def _inputs(spec: Recurrence, tokens: int) -> RecurrenceInputs:
    kv = (1, KV_HEADS, tokens)
    wide = spec.decay == "channel"
    low_rank = _meta(*kv, spec.key_dim) if spec.correction == "untied" else None
    return RecurrenceInputs(
        *_qkv(spec.key_dim, tokens),
        _meta(*kv, *([spec.key_dim] if wide else []), dtype=torch.float32),
        _meta(*kv) if spec.correction == "delta" else None,
        low_rank,
        low_rank,
        _meta(KV_HEADS, spec.key_dim, dtype=torch.float32) if spec.bonus else None,
    )


def _recurrence(spec: Recurrence) -> Plan:
    def plan(run: Runner, target: Target) -> Any:
        x = _inputs(spec, TOKENS)
        out, _ = recurrence.forward(spec, x, run, target)
        return recurrence.backward(spec, x, out, None, run, target)

    return plan


def _walk(spec: Recurrence) -> Plan:
    return lambda run, target: recurrence.forward(spec, _inputs(spec, 1), run, target)


def _attention(spec: BlockSparse) -> Plan:
    def plan(run: Runner, target: Target) -> Any:
        q, k, v = _qkv(spec.key_dim)
        per_head = _meta(HEADS, dtype=torch.float32)
        blocks = None
        if spec.block:
            blocks = _meta(1, KV_HEADS, TOKENS // spec.block, 16, dtype=torch.int32)
        x = BlockSparseInputs(
            *(q, k, v),
            sinks=per_head if spec.sinks else None,
            slopes=per_head if spec.slopes else None,
            blocks=blocks,
        )
        out, lse = block_sparse.forward(spec, x, run, target)
        return block_sparse.backward(spec, x, out, lse, out, run, target)

    return plan


def _decode(spec: Decode) -> Plan:
    def plan(run: Runner, target: Target) -> Any:
        q, k, v = _qkv(spec.key_dim)
        pages = None
        if spec.page:
            k = _meta(512, KV_HEADS, spec.page, spec.key_dim)
            v, pages = k, _meta(1, 256, dtype=torch.int32)
        lengths = _meta(1, dtype=torch.int32)
        x = DecodeInputs(q[:, :, :1], k, v, lengths, pages)
        return decode.forward(spec, x, run, target)

    return plan
