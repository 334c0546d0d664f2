"""The operator `attention_rewriter::decode`: newest tokens against a cache, without gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rewriter.backends.inputs import DecodeInputs
from rewriter.backends.ops.choice import raw
from rewriter.backends.ops.codec import decode as parse
from rewriter.backends.reference.decode import decode as reference
from rewriter.ir.decode import Decode


@torch.library.custom_op("attention_rewriter::decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    pages: Tensor | None,
    index: Tensor | None,
    sinks: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, n, Dv) in the dtype of v and log-sum-exps (B, H, n) float32, contiguous.

    Args: as `DecodeInputs`; `spec` from `codec.encode`; `backend` a name of `choice`.
    """
    kind = cast(Decode, parse(spec))
    kernels = raw(backend, "decode")
    if kernels is None:
        out, lse = reference(kind, q, k, v, lengths=lengths, pages=pages, index=index, sinks=sinks)
    else:
        out, lse = kernels.forward(kind, DecodeInputs(q, k, v, lengths, pages, index, sinks))
    return out.contiguous(), lse.contiguous()


@decode.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, H, n, _ = q.shape
    return v.new_empty((B, H, n, v.shape[-1])), v.new_empty((B, H, n), dtype=torch.float32)
