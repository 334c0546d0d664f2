"""A whole gated MLP block in generated C++: f(x G^T + c) * (x U^T + b), times D^T, plus d.

On matrix tiles, in bfloat16. The hidden numbers stay in the second cache; see
`include/gated_tiles.hpp`. Other dtypes and machines take the parts one by one (`linear.py`).
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import Unit, function
from rewriter.backends.cpu.linear import GATES, Gate, even_band, parts_of
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.errors import UnsupportedError

_TILE = 32
_NEAR = 3 * 2**19  # bytes of a band that stay in the second cache: rows of x and of hidden numbers
_LEAST = 128  # rows of a band; fewer do not pay for fetching all weights
_FEWEST = 32  # rows of a call, likewise
_PACKED = 2**25  # bytes of packed weights of a call


def decline(x: Tensor, gate: Tensor, down: Tensor) -> str | None:
    """Why there is no kernel for a block; None if there is one.

    Args:
        x: (..., K).
        gate: (H, K), as the other projection.
        down: (N, H).
    """
    if x.dtype != torch.bfloat16:
        return f"whole gated blocks are computed in bfloat16, not {x.dtype}"
    (hidden, width), outputs = gate.shape, down.shape[0]
    if min(hidden, width, outputs) == 0 or x.numel() < _FEWEST * width:
        return "the block has too few rows or no columns"
    if _rows(width, hidden) < _LEAST or _bytes(width, hidden, outputs) > _PACKED:
        return "the block is too large for the second cache"
    found = find()
    return found if isinstance(found, str) else None


def forward(
    x: Tensor, gate: Gate, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None
) -> Tensor:
    """(..., N), contiguous, for x (..., K), gate and up (H, K) with equal strides, down (N, H).

    Sums are float32; hidden numbers are rounded to bfloat16 once.

    Raises:
        UnsupportedError: there is no kernel for the call; `decline` says why beforehand.
    """
    reason = decline(x, up, down)
    run = find()
    if reason is not None or isinstance(run, str):
        raise UnsupportedError(f"no CPU kernel serves this gated block: {reason or run}")
    (H, K), N = up.shape, down.shape[0]
    if gate.weight.stride() != up.stride():
        raise UnsupportedError("the two matrices of a gated layer lie in different orders")
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    M, threads = rows.shape[0], torch.get_num_threads()
    matrices = [t if 1 in t.stride() else t.contiguous() for t in (up, gate.weight, down)]
    biases = [None if t is None else t.contiguous() for t in (up_bias, gate.bias, bias)]
    w, g, d = matrices
    band = even_band(M, _rows(K, H), threads)
    own = band * 2 * (_up(K) + _up(H) + 4 * _TILE)
    scratch = torch.empty(_bytes(K, H, N) + threads * own, dtype=torch.uint8)
    fields = array(
        "q",
        (
            *(rows.data_ptr(), w.data_ptr(), _pointer(biases[0]), 0, scratch.data_ptr()),
            *(M, H, K, rows.stride(0), *w.stride(), 0, 0, threads, band),
            *(g.data_ptr(), _pointer(biases[1]), GATES[gate.activation]),
            *(0, d.data_ptr(), _pointer(biases[2]), out.data_ptr(), scratch.data_ptr()),
            *(M, N, H, 0, *d.stride(), N, 0, threads, band, 0, 0, 0),
        ),
    )
    run(fields.buffer_info()[0])
    return out


def _up(n: int) -> int:
    return -(-n // _TILE) * _TILE


def _rows(width: int, hidden: int) -> int:
    return _NEAR // (2 * (_up(width) + _up(hidden))) // _TILE * _TILE


def _bytes(width: int, hidden: int, outputs: int) -> int:
    return 2 * _up(hidden) * (2 * _up(width) + _up(outputs))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def find() -> Callable[[int], None] | str:
    """The compiled kernel on this machine, or why there is none."""
    target = host_target()
    return target if isinstance(target, str) else _find(target)


@lru_cache(maxsize=4)
def _find(target: Target) -> Callable[[int], None] | str:
    return function(unit_of(target), "gated_tiles", ctypes.c_void_p)


def unit_of(target: Target) -> Unit | str:
    """The unit on a target, or why there is none."""
    if not target.tiles:
        return "this processor has no matrix tiles"
    constants = {"DEPTH": 0, "SMALL": 0, "PARTS": parts_of(torch.bfloat16, target)}
    headers = ["tiles", "linear_tiles", "gated_tiles"]
    source = assemble(target, headers, constants, {"io_t": "bf16"}, split="linear")
    return Unit("gated_block_bf16", source, target)


def source_of() -> str:
    """The generated code on this machine, or why there is none."""
    target = host_target()
    unit = target if isinstance(target, str) else unit_of(target)
    return unit if isinstance(unit, str) else unit.source
