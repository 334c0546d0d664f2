"""The units of a `BlockSparse`: what is compiled for which spec, dtype and target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from rewriter.backends.cpu.build import Unit
from rewriter.backends.cpu.predicate import Printed, print_predicate
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.predicate import lower

Pass = Literal["forward", "backward"]
Packing = Literal["rows", "pairs", "tiles", "gradient tiles"]
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
PANELS = 4  # panels of query rows that share the keys of a round
SPLIT_PANELS = 8  # the same where a float32 number is three of bfloat16: fewer turns of the keys
KEYS = 64  # keys of a round on vectors
TILE_KEYS = 64  # on tile registers: scores and weights of two rounds stay in the first cache
SPLIT_KEYS = 128  # the same in three parts, where sums have to be loaded and stored less often
WIDEST = 512  # a head beyond it would not fit the caches the kernels are laid out for


@dataclass(frozen=True)
class Kernel:
    """A unit and the sizes compiled into it.

    Attributes:
        unit: what is compiled.
        tables: data of the mask predicate, flat uint8.
        rows, keys: query rows of a task, keys of a tile.
        packing: how keys and values are laid out; see `attention_call`.
    """

    unit: Unit
    tables: tuple[Tensor, ...]
    rows: int
    keys: int
    packing: Packing


@lru_cache(maxsize=1024)
def kernel_of(
    spec: BlockSparse, dtype: torch.dtype, target: Target, name: Pass, split: bool = False
) -> Kernel | str:
    """The kernel of a pass over a spec on a target, or why there is none.

    `split`: on tile registers, float32 numbers as three of bfloat16; so are gradients of bfloat16.
    """
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    widest = max(spec.key_dim, spec.value_dim)
    if min(spec.key_dim, spec.value_dim) < 1 or widest > WIDEST:
        return f"CPU kernels take head sizes from 1 to {WIDEST}"
    try:
        printed = print_predicate(lower(spec.mask))
    except ValueError as error:
        return str(error)
    if isinstance(printed, str):
        return printed
    panel = 2 * target.lanes
    panels = SPLIT_PANELS if split and widest <= 128 else PANELS
    rows = (panels if name == "forward" or widest <= 128 else 2) * panel
    if spec.block:
        rows = min(rows, -(-spec.block // panel) * panel)
    packing = _packing(spec, dtype, target, name, split)
    keys = KEYS if widest <= 128 else 32
    if packing == "tiles":
        keys = SPLIT_KEYS if split else TILE_KEYS
    constants: dict[str, int | float | bool] = {
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "QROWS": rows,
        "KROWS": keys,
        "HAS_SOFTCAP": spec.softcap is not None,
        "SIGMOID": spec.weight == "sigmoid",
        "HAS_SINKS": spec.sinks,
        "HAS_SLOPES": spec.slopes,
        "HAS_BIAS": spec.bias,
        "HAS_TEMPERATURE": spec.temperature,
        "LISTS": spec.block > 0,
        "PAIRS": packing == "pairs",
        "KEY_STEP": {"rows": 1, "pairs": 2}.get(packing, 32),
    }
    kind = {"tiles": "tiles", "gradient tiles": "tiles_backward"}.get(packing, name)
    unit = _unit(kind, constants, NAMES[dtype], printed, target)
    tables = tuple(torch.from_numpy(t.copy()) for t in printed.tables)
    return Kernel(unit, tables, rows, keys, packing)


def _packing(
    spec: BlockSparse, dtype: torch.dtype, target: Target, name: Pass, split: bool
) -> Packing:
    if split:
        return "tiles" if name == "forward" else "gradient tiles"
    if name == "backward" or dtype != torch.bfloat16:
        return "rows"
    if target.tiles and spec.block % 32 == 0:
        return "tiles"
    even = spec.key_dim % 2 == 0 and spec.block % 2 == 0
    return "pairs" if target.bf16_dot and even else "rows"


def _unit(
    name: str,
    constants: dict[str, int | float | bool],
    scalar: str,
    printed: Printed,
    target: Target,
) -> Unit:
    types = {"io_t": scalar, "bias_t": "float"}
    headers = ["pack", "predicate", "attention", f"attention_{name}"]
    source = assemble(target, headers, constants, types, printed.code, split="attention")
    return Unit(f"attention_{name}_{constants['DK']}_{scalar}", source, target)
