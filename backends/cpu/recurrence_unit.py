"""Translation units of the recurrence: constants of a spec, then its templates."""

from __future__ import annotations

import torch

from rewriter.backends.cpu.build import Unit
from rewriter.backends.cpu.source import assemble, header
from rewriter.backends.cpu.target import Target
from rewriter.ir.recurrence import Recurrence

CTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
_DECAYS = ("none", "head", "token", "channel")
_CORRECTIONS = ("none", "delta", "untied")


def chunk_length(spec: Recurrence) -> int:
    """Tokens in a chunk: longer ones amortise the state, shorter ones waste less on pairs."""
    return 16 if spec.decay == "channel" else 32


def in_tiles(spec: Recurrence, dtype: torch.dtype, target: Target) -> bool:
    """Whether the forward pass of a causal spec multiplies in tiles of bf16."""
    plain = spec.correction != "untied" and spec.decay != "channel" and not spec.bonus
    whole = spec.key_dim % 32 == 0 and spec.value_dim % 32 == 0
    return target.tiles and dtype == torch.bfloat16 and spec.causal and plain and whole


def forward_unit(spec: Recurrence, dtype: torch.dtype, target: Target) -> Unit:
    return _unit(spec, dtype, target, "forward")


def backward_unit(spec: Recurrence, dtype: torch.dtype, target: Target) -> Unit:
    return _unit(spec, dtype, target, "backward")


def step_unit(spec: Recurrence, dtype: torch.dtype, target: Target) -> Unit:
    return _unit(spec, dtype, target, "step")


def _unit(spec: Recurrence, dtype: torch.dtype, target: Target, part: str) -> Unit:
    tiles = part == "forward" and in_tiles(spec, dtype, target)
    constants: dict[str, int | float | bool] = {
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "DECAY": _DECAYS.index(spec.decay),
        "CORRECTION": _CORRECTIONS.index(spec.correction),
        "EXCLUSIVE": spec.read == "exclusive",
        "BONUS": spec.bonus,
        "ONES": spec.normaliser == "ones",
        "CAUSAL": spec.causal,
        "CHUNK": 64 if tiles else chunk_length(spec),
        "TILES": tiles,
        "SCALE": float(spec.scale),
    }
    source = assemble(
        target,
        ("math", "pack", *(("tiles",) if tiles else ()), f"recurrence_{part}"),
        constants,
        {"T": CTYPES[dtype], "Session": "Tiles" if tiles else "char"},
        _shared(part, tiles),
    )
    return Unit(f"recurrence_{part}", source, target)


def _shared(part: str, tiles: bool) -> str:
    """What comes between the constants and the last header."""
    text = "#include <cstdlib>\n" + header("recurrence")
    if part == "step":
        return text
    text += header("recurrence_products") + header("recurrence_room")
    text += header("recurrence_tiles") if tiles else ""
    text += header("recurrence_chunk")
    if part == "forward":
        return text
    text += header("recurrence_sweep") + header("recurrence_pairs")
    return text + header("recurrence_corrections")
