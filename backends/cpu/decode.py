"""`Decode` in generated C++: a few new tokens against a cache, float32 and bfloat16.

One unit is compiled for each combination of head sizes, dtype and kind of cache; everything else
is an argument. Catalogue: sparse.md section 1 (K3, K4).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu.build import NoKernel, Unit, load
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import Target, host_target
from rewriter.backends.inputs import DecodeInputs
from rewriter.errors import UnsupportedError
from rewriter.ir.decode import Decode

NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
WIDEST = 512
ROWS = 4096  # query rows of a KV head: tokens times heads of the group
_SHARE = 256  # keys below which a range is not split further


def decline(spec: Decode, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why it cannot serve a spec, as one sentence, or None if it can. Compiles what is needed."""
    if needs_grad:
        return "the CPU kernel of Decode has no backward pass"
    found = find(spec, dtype)
    return found if isinstance(found, str) else None


@lru_cache(maxsize=256)
def unit_of(spec: Decode, dtype: torch.dtype, target: Target) -> Unit | str:
    """The unit of a spec on a target, or why there is none."""
    if dtype not in NAMES:
        return f"CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if min(spec.key_dim, spec.value_dim) < 1 or max(spec.key_dim, spec.value_dim) > WIDEST:
        return f"CPU kernels take head sizes from 1 to {WIDEST}"
    constants: dict[str, int | float | bool] = {
        "DK": spec.key_dim,
        "DV": spec.value_dim,
        "HAS_SOFTCAP": spec.softcap is not None,
        "HAS_SINKS": spec.sinks,
        "PAGED": spec.cache == "paged",
        "GATHERED": spec.cache == "gathered",
        "TILED": _tiled(spec, dtype, target),
        "PAIRED": dtype == torch.bfloat16 and target.bf16_dot and spec.value_dim % 32 == 0,
    }
    scalar = NAMES[dtype]
    source = assemble(target, ["pack", "math", "decode"], constants, {"io_t": scalar})
    return Unit(f"decode_{spec.cache}_{spec.key_dim}_{scalar}", source, target)


def forward(spec: Decode, x: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Attention of the n newest tokens to the cache that holds them.

    Args:
        spec: what to compute.
        x: tensors on the CPU, q, k, v of one dtype, float32 or bfloat16, with any strides.

    Returns:
        out (B, H, n, Dv) in the dtype of v and the log-sum-exp (B, H, n) float32, contiguous; 0 and
        -inf in a row without keys.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    found = find(spec, x.v.dtype)
    if not x.q.dtype == x.k.dtype == x.v.dtype:
        found = "q, k and v differ in dtype"
    B, H, n, _ = x.q.shape
    Hkv, slots = x.k.shape[1], x.k.shape[2]
    rows = H // Hkv * n
    if rows > ROWS:
        found = f"{rows} query rows share a KV head, more than {ROWS}"
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this Decode call: {found}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.q, x.k, x.v))
    out = torch.empty((B, H, n, spec.value_dim), dtype=v.dtype)
    lse = torch.empty((B, H, n), dtype=torch.float32)
    sinks = None if x.sinks is None else x.sinks.float().contiguous()
    lengths, pages, index = _ints(x.lengths), _ints(x.pages), _ints(x.index)
    listed = pages if index is None else index
    table = 0 if listed is None else listed.shape[-1]
    threads = torch.get_num_threads()
    keys = table if index is not None else table * slots if pages is not None else slots
    splits = _splits(B * Hkv, keys, threads)
    scratch = torch.empty(B * Hkv * splits * rows * found.row_floats, dtype=torch.float32)
    fields = array(
        "q",
        (
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()),
            *(_pointer(sinks), _pointer(lengths), _pointer(pages), _pointer(index)),
            *(scratch.data_ptr(), B, H, Hkv, n, slots, spec.cache == "ring", table),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], splits, threads),
        ),
    )
    found.run(fields.buffer_info()[0], spec.scale, spec.softcap or 1.0)
    return out, lse


def _splits(units: int, keys: int, threads: int) -> int:
    """Ranges that the keys are cut into, so that every thread has work."""
    if units % threads == 0:
        return 1
    return max(1, min(-(-4 * threads // units), keys // _SHARE))


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel: its function and the floats of scratch memory that a query row needs."""

    run: Callable[[int, float, float], None]
    row_floats: int


@lru_cache(maxsize=256)
def find(spec: Decode, dtype: torch.dtype) -> Kernel | str:
    """The compiled kernel of a spec on this machine, or why there is none."""
    target = host_target()
    if isinstance(target, str):
        return target
    unit = unit_of(spec, dtype, target)
    library = NoKernel(unit) if isinstance(unit, str) else load(unit)
    if isinstance(library, NoKernel):
        return library.reason
    run = library.decode
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_float, ctypes.c_float], None
    key, value = (-(-d // target.lanes) * target.lanes for d in (spec.key_dim, spec.value_dim))
    if _tiled(spec, dtype, target):
        key *= 2  # a row is one of the four columns of a tile
    return Kernel(run, key + value + 2)


def _tiled(spec: Decode, dtype: torch.dtype, target: Target) -> bool:
    """Whether keys are multiplied on tile registers."""
    return dtype == torch.bfloat16 and target.tiles and spec.key_dim % 32 == 0


def _ints(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
