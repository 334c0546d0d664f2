"""Random recurrence calls for the interpreter, small and ragged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.ir.recurrence import Recurrence


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    length: int = 100
    cuts: tuple[int, ...] = ()
    start: bool = True


def make(
    spec: Recurrence,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gate: float = 1.0,
) -> RecurrenceInputs:
    """Inputs with log decays around -gate."""
    g = torch.Generator().manual_seed(seed)
    B, H, G, N = shape.batch, shape.heads, shape.kv_heads, shape.length

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    q, k, v = (
        rand(B, H, N, spec.key_dim),
        rand(B, G, N, spec.key_dim),
        rand(B, G, N, spec.value_dim),
    )
    if spec.normaliser == "ones":
        q, k = F.softplus(q), F.softplus(k)
    if spec.correction != "none":
        k = F.normalize(k, dim=-1)
    wide = {"none": None, "head": (G,), "token": (B, G, N), "channel": (B, G, N, spec.key_dim)}
    form = wide[spec.decay]
    rows = len(shape.cuts) - 1 if shape.cuts else B
    width = spec.state_width
    untied = spec.correction == "untied"
    start = rand(rows, G, spec.key_dim, width) if shape.start else None
    if start is not None and spec.normaliser == "ones":
        start[..., -1] = start[..., -1].abs()
    return RecurrenceInputs(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        None if form is None else F.logsigmoid(rand(*form)) * gate,
        torch.sigmoid(rand(B, G, N)).to(dtype) if spec.correction == "delta" else None,
        -k.to(dtype) if untied else None,
        (k * torch.sigmoid(rand(B, G, N, spec.key_dim))).to(dtype) if untied else None,
        rand(G, spec.key_dim) if spec.bonus else None,
        torch.tensor(shape.cuts, dtype=torch.int32) if shape.cuts else None,
        start,
    )


def error(got: torch.Tensor, want: torch.Tensor, scale: float = 0.0) -> float:
    """Largest error relative to the largest value, or to `scale` where that is larger."""
    assert got.shape == want.shape, (got.shape, want.shape)
    top = want.abs().max().clamp_min(max(scale, 1e-6))
    return float((got.double() - want).abs().max() / top)
