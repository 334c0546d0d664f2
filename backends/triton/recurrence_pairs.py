"""Gradients through the scores of a decay per channel, where pairs do not factor.

From the gradient W of the scores A_tj = sum_d left_td k_jd exp(reach_td - written_jd) come those of
left and k. The exponents' own are left * grad_left for the rows and -k * grad_k for the keys, which
the caller forms after all terms are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from rewriter.backends.triton.chunks import block, strides
from rewriter.backends.triton.emit import emit
from rewriter.backends.triton.launch import Launch
from rewriter.backends.triton.recurrence_forward import Call, Sums
from rewriter.backends.triton.targets import CHUNK


def pair_gradients(call: Call, grad: Tensor, values: Tensor, mass: Tensor | None) -> Tensor:
    """(B, H, N, CHUNK) float32: scale (grad_t . v_j) for the keys of the chunk of row t."""
    spec, size = call.spec, call.size
    out = call.float32(size.batch, size.heads, size.length, CHUNK)
    chosen = call.config("pairs")
    call.run(
        Launch(
            _module(call, strict=False, ones=mass is not None).pairs,
            (size.slots, size.batch * size.heads),
            {
                "grad": grad,
                "v": values,
                **({} if mass is None else {"grad_mass": mass}),
                "out": out,
                **size.chunk_args(),
                **strides("v", values),
                "heads": size.heads,
                "group": size.group,
                "length": size.length,
                "scale": spec.scale,
            },
            {"DV": spec.value_dim, "C": CHUNK, "BV": block(spec.value_dim, chosen.values)},
            chosen.warps,
            chosen.stages,
        )
    )
    return out


def add_through_scores(
    call: Call,
    sums: Sums,
    left: Tensor,
    reach: Tensor,
    weights: Tensor,
    strict: bool,
    grad_left: Tensor,
    grad_k: Tensor,
) -> None:
    """Add to grad_left (B, heads, N, Dk) and grad_k (B, Hkv, N, Dk), both float32.

    Args:
        left, reach, strict: as they were given to `channel_scores`.
        weights: gradient of the scores, (B, heads, N, CHUNK); only visible pairs are read.
    """
    size, k = call.size, call.x.k
    heads = left.shape[1]
    module = _module(call, strict=strict, ones=False)
    chosen = call.config("pairs")
    keys = block(call.spec.key_dim, chosen.keys)
    blocks = CHUNK // 16 * -(-call.spec.key_dim // keys)
    shared = {
        "reach": reach,
        "written": sums.written,
        "weights": weights,
        **size.chunk_args(),
        "heads": heads,
        "group": heads // size.kv_heads,
        "length": size.length,
    }
    constants = {"DK": call.spec.key_dim, "C": CHUNK, "BK": keys}
    call.run(
        Launch(
            module.rows,
            (size.slots, blocks, size.batch * heads),
            {"k": k, "grad_left": grad_left, **shared, **strides("k", k)},
            constants,
            chosen.warps,
            chosen.stages,
            repeatable=False,
        )
    )
    call.run(
        Launch(
            module.columns,
            (size.slots, blocks, size.batch * size.kv_heads),
            {"left": left, "grad_k": grad_k, **shared, **strides("left", left)},
            constants,
            chosen.warps,
            chosen.stages,
            repeatable=False,
        )
    )


@dataclass(frozen=True)
class PairGradients:
    """Gradients of left, k and of the decay sums of rows and keys, float32."""

    left: Tensor
    k: Tensor
    reach: Tensor
    written: Tensor


def through_scores(
    call: Call, sums: Sums, left: Tensor, reach: Tensor, weights: Tensor, strict: bool
) -> PairGradients:
    """All gradients through scores; arguments as for `add_through_scores`."""
    k = call.x.k
    grad_left = torch.zeros(left.shape, dtype=torch.float32, device=k.device)
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    add_through_scores(call, sums, left, reach, weights, strict, grad_left, grad_k)
    B, G, N, D = k.shape
    rows = (left * grad_left).view(B, G, -1, N, D).sum(2)
    return PairGradients(grad_left, grad_k, rows, -k * grad_k)


def _module(call: Call, strict: bool, ones: bool) -> ModuleType:
    return emit(
        "recurrence_pairs",
        strict=strict,
        ones=ones,
        packed=call.packed,
        precision=call.precision,
    )
