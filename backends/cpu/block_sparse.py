"""`BlockSparse` in generated C++: forward and backward on float32 and bfloat16 tensors.

One unit is compiled for each combination of head sizes, dtype, score hooks and mask predicate;
lengths, batch, heads, strides, scale and soft cap are arguments. The schedule comes from
`backends.schedule`. Catalogue: sparse.md section 1 (K1, K2, K6a).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.backends.cpu import attention_forms as forms
from rewriter.backends.cpu.attention_call import Call, GradBuffers, address
from rewriter.backends.cpu.attention_units import Kernel, Pass, kernel_of
from rewriter.backends.cpu.build import NoKernel, load
from rewriter.backends.cpu.target import Target, host_target
from rewriter.backends.inputs import BlockSparseGrads, BlockSparseInputs
from rewriter.errors import UnsupportedError
from rewriter.ir.block_sparse import BlockSparse

Run = Callable[..., int | None]


def decline(spec: BlockSparse, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why it cannot serve a spec, as one sentence, or None if it can. Compiles what is needed."""
    passes: tuple[Pass, ...] = ("forward", "backward") if needs_grad else ("forward",)
    for name in passes:
        found = find(spec, dtype, name)
        if isinstance(found, str):
            return found
    return None


def forward(
    spec: BlockSparse, x: BlockSparseInputs, top: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys the predicate allows.

    Args:
        spec: what to compute.
        x: tensors on the CPU, q, k, v of one dtype, float32 or bfloat16, with any strides.
        top: (B, H, M) float32, contiguous; receives the largest score of every row, -inf where it
            sees nothing.

    Returns:
        out (B, H, M, Dv) in the dtype of v and the log-sum-exp (B, H, M) float32, contiguous; 0 and
        -inf in a row that sees nothing.

    Raises:
        UnsupportedError: there is no kernel for the call; `decline` says why beforehand.
    """
    kernel, run = _split(spec, x, "forward") or _ready(spec, x, "forward")
    return _forward(spec, x, kernel, run, top)


def _forward(
    spec: BlockSparse, x: BlockSparseInputs, kernel: Kernel, run: Run, top: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, M, _ = x.q.shape
    out = torch.empty((B, H, M, spec.value_dim), dtype=x.v.dtype)
    lse = torch.empty((B, H, M), dtype=torch.float32)
    if min(x.q.numel(), x.k.numel()) == 0:
        if top is not None:
            top.fill_(-torch.inf)
        return _nothing(spec, x, out, lse)
    call = Call(spec, x, kernel)
    inputs = call.fields(out, lse, top)
    run(address(inputs), spec.scale, spec.softcap or 1.0)
    return out, lse


def backward(
    spec: BlockSparse, x: BlockSparseInputs, out: Tensor, lse: Tensor, grad_out: Tensor
) -> BlockSparseGrads:
    """Gradients of the inputs that were given. Scores are computed again, none are kept.

    Args:
        spec, x: of the forward call; out, lse: its results.
        grad_out: gradient of `out`.

    Raises:
        UnsupportedError: there is no kernel for the call.
    """
    if min(x.q.numel(), x.k.numel()) == 0:
        return _no_grads(x)
    out, lse = out.contiguous(), lse.contiguous()
    tiles = _split(spec, x, "backward")
    if tiles is not None:
        grads, usable = _backward(spec, x, out, lse, grad_out, *tiles)
        if usable:
            return grads
    return _backward(spec, x, out, lse, grad_out, *_ready(spec, x, "backward"))[0]


def _backward(
    spec: BlockSparse,
    x: BlockSparseInputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    kernel: Kernel,
    run: Run,
) -> tuple[BlockSparseGrads, bool]:
    """The gradients, and whether they are of use: on tiles not where a number is not finite."""
    call = Call(spec, x, kernel)
    to = GradBuffers(spec, x, call, grad_out)
    inputs, outputs = call.fields(out, lse), to.fields()
    usable = run(address(inputs), address(outputs), spec.scale, spec.softcap or 1.0)
    return to.results(lse), bool(usable)


def find(
    spec: BlockSparse, dtype: torch.dtype, name: Pass, split: bool = False
) -> tuple[Kernel, Run] | str:
    """The compiled kernel of a pass on this machine, or why there is none. `split`: `kernel_of`."""
    target = host_target()
    if isinstance(target, str):
        return target
    # Where the queries begin is an argument of the kernel.
    return _find(replace(spec, offset=0), dtype, name, split, target)


@lru_cache(maxsize=512)
def _find(
    spec: BlockSparse, dtype: torch.dtype, name: Pass, split: bool, target: Target
) -> tuple[Kernel, Run] | str:
    kernel = kernel_of(spec, dtype, target, name, split)
    if isinstance(kernel, str):
        return kernel
    library = load(kernel.unit)
    if isinstance(library, NoKernel):
        return library.reason
    run = library[name]
    structs = [ctypes.c_void_p] * (1 if name == "forward" else 2)
    run.argtypes = [*structs, ctypes.c_float, ctypes.c_float]
    run.restype = None if name == "forward" else ctypes.c_int
    return kernel, run


def _split(spec: BlockSparse, x: BlockSparseInputs, name: Pass) -> tuple[Kernel, Run] | None:
    """The kernel on tile registers of a pass over a call that is faster there than on vectors.

    bfloat16 rows go forward on tiles wherever there are some.
    """
    target, dtype = host_target(), x.q.dtype
    if isinstance(target, str) or not target.tiles or not forms.fits(spec):
        return None
    if not dtype == x.k.dtype == x.v.dtype or x.k.numel() == 0:
        return None
    if dtype != torch.float32 and (dtype, name) != (torch.bfloat16, "backward"):
        return None
    seen = forms.keys_seen(spec, x)
    if seen < forms.FEW or seen < _least_keys(target, name, dtype):
        return None
    found = find(spec, dtype, name, split=True)
    return None if isinstance(found, str) else found


@lru_cache(maxsize=8)
def _least_keys(target: Target, name: Pass, dtype: torch.dtype) -> float:
    """Keys that a row has to see on average for tiles to be faster in a pass."""
    kinds = [_find(forms.SAMPLE, dtype, name, split, target) for split in (False, True)]
    vectors, tiles = (None if isinstance(kind, str) else kind for kind in kinds)
    if vectors is None or tiles is None:
        return math.inf

    def of(kind: tuple[Kernel, Run]) -> forms.Form:
        if name == "forward":
            return lambda x: _forward(forms.SAMPLE, x, *kind, None)
        # Values do not matter for the time: any outputs will do.
        return lambda x: _backward(
            forms.SAMPLE, x, x.v, x.v[..., 0].float().contiguous(), x.v, *kind
        )

    source = vectors[0].unit.source + tiles[0].unit.source
    return forms.least_keys(source, dtype, of(vectors), of(tiles))


def _ready(spec: BlockSparse, x: BlockSparseInputs, name: Pass) -> tuple[Kernel, Run]:
    found = find(spec, x.v.dtype, name)
    if not x.q.dtype == x.k.dtype == x.v.dtype:
        found = "q, k and v differ in dtype"
    if isinstance(found, str):
        raise UnsupportedError(f"no CPU kernel serves this BlockSparse call: {found}")
    return found


def _nothing(
    spec: BlockSparse, x: BlockSparseInputs, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    lse.fill_(0.0 if spec.weight == "sigmoid" else -torch.inf)
    if x.sinks is not None:
        lse.copy_(x.sinks[:, None].expand_as(lse))
    return out.zero_(), lse


def _no_grads(x: BlockSparseInputs) -> BlockSparseGrads:
    given = (x.q, x.k, x.v, x.sinks, x.slopes, x.bias, x.temperature)
    return BlockSparseGrads(*(None if t is None else torch.zeros_like(t) for t in given))  # type: ignore[arg-type]
