"""Comparing outputs of two models or two modules."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Floating-point tensors of any output structure, in order; absent ones are skipped."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def first_tensor(output: Any) -> torch.Tensor:
    """Logits of a language model, hidden states of an encoder: the first floating tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    return tensors_of(output)[0]


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference in fp32; infinite for different shapes or one-sided NaN."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if bool((torch.isnan(a) != torch.isnan(b)).any()):
        return float("inf")
    return float((torch.nan_to_num(a.float()) - torch.nan_to_num(b.float())).abs().max())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in fp32."""
    scale = float(b.float().norm())
    return float((a.float() - b.float()).norm()) / max(scale, 1e-12)
