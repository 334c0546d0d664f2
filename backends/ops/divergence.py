"""Divergence of logits with its gradient: generated code on a CPU that has it, else torch."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.cpu import divergence as generated
from rewriter.backends.ops.choice import VARIABLE, switched_on


def divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    ce: float,
    weight: float,
    chunk: int,
    *,
    count: int | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean over rows of (1 - ce) KL(teacher || student) + weight * cross-entropy, and its slope.

    No float32 copy of the logits outlives its rows, and the slope is computed along with the loss.

    Args:
        student, teacher: (T, V) logits of any floating dtype; computed in float32.
        labels: (T) int64; negative where there is none.
        ce, weight: of the two terms.
        chunk: rows held in float32 at once where torch computes.
        count: of the rows over which the mean is taken, where these are some of them.
        into: where the slope goes, (T, V) in the student's dtype with rows in one piece; it may be
            the student's own memory.

    Returns:
        A float64 scalar, and its gradient (T, V) in the dtype of the student.
    """
    scale = 1.0 / max(1, student.shape[0] if count is None else count)
    if _served(student, teacher):
        total, slope = generated.forward(student, teacher, labels, ce, weight, scale, into)
        return total * scale, slope
    slopes = torch.empty_like(student) if into is None else into
    return _by_torch(student, teacher, labels, ce, weight, chunk, scale, slopes)


def _served(student: Tensor, teacher: Tensor) -> bool:
    return (
        student.device.type == "cpu"
        and student.dtype == teacher.dtype
        and student.dtype in generated.NAMES
        and switched_on("cpu", os.environ.get(VARIABLE))
        and not isinstance(generated.find(student.dtype), str)
    )


def _by_torch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    ce: float,
    weight: float,
    chunk: int,
    scale: float,
    slopes: Tensor,
) -> tuple[Tensor, Tensor]:
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for start in range(0, student.shape[0], chunk):
        part = slice(start, start + chunk)
        log_s = F.log_softmax(student[part].float(), dim=-1)
        log_t = F.log_softmax(teacher[part].float(), dim=-1)
        prob_t = (1 - ce) * log_t.exp()
        known = (labels[part] >= 0).nonzero().squeeze(-1)
        picked = labels[part][known]
        total += (prob_t * (log_t - log_s)).sum() - weight * log_s[known, picked].sum()
        share = torch.full((log_s.shape[0], 1), 1.0 - ce, device=student.device)
        share[known] += weight
        slope = log_s.exp() * share - prob_t
        slope[known, picked] -= weight
        slopes[part] = (slope * scale).to(slopes.dtype)
    return total * scale, slopes
