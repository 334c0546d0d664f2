"""The two losses: normalised output error of one layer, and chunked divergence of logits."""

from __future__ import annotations

from typing import Any

import torch

from rewriter.backends.ops.divergence import divergence as rows_divergence
from rewriter.distill.sharding import total


def output_error(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error over the variance of the teacher's output.

    A layer that outputs the teacher's mean everywhere scores 1, so layers of any magnitude are
    comparable and share one learning rate.

    Args:
        student, teacher: (B, N, ...) of any floating dtype; computed in float32.
        mask: (B, N), zero at padding, which does not count. Ignored if it does not fit the
            leading axes (a module that flattens its batch).

    Returns:
        A float32 scalar.
    """
    out, target = student.float(), teacher.detach().float()
    if mask is not None and tuple(mask.shape) == tuple(target.shape[:2]):
        valid = mask.bool()
        out, target = out[valid], target[valid]
    else:
        out, target = out.flatten(0, -2), target.flatten(0, -2)
    # Mean and spread are those of the whole batch, whoever holds its rows.
    rows = total(torch.full((), target.shape[0], dtype=torch.float32, device=target.device))
    middle = total(target.sum(dim=0)) / rows
    spread = total((target - middle).square().sum()) / (rows * target.shape[1])
    return (out - target).square().mean() / spread.clamp_min(1e-12)


class _ChunkedDivergence(torch.autograd.Function):
    """Computes the gradient along with the loss, so that no float32 copy of the logits is kept.
    The stored gradient has the dtype of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        ce: float,
        chunk: int,
    ) -> torch.Tensor:
        count = max(1, student.shape[0])
        # Cross-entropy is a mean over the tokens that have a label, so these weigh more.
        weight = ce * count / max(1, int((labels >= 0).sum()))
        loss, slope = rows_divergence(student, teacher, labels, ce, weight, chunk)
        ctx.save_for_backward(slope)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return saved.mul_(grads[0].to(saved.dtype)), None, None, None, None


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ce: float = 0.0,
    chunk: int = 256,
) -> torch.Tensor:
    """(1 - ce) KL(teacher || student) + ce * cross-entropy, in nats a token.

    Args:
        student, teacher: (B, N, V) logits.
        mask: (B, N), zero at padding.
        labels: (B, N) int64, the token that follows; negative where none does.
        ce: weight of the cross-entropy, 0 to 1.
        chunk: tokens whose logits are held in float32 at once where no generated code runs.

    Returns:
        A float32 scalar that can be differentiated with respect to the student's logits.
    """
    if labels is None:
        labels = torch.full(student.shape[:2], -1, dtype=torch.int64, device=student.device)
    rows = student.flatten(0, 1), teacher.detach().flatten(0, 1), labels.flatten()
    if mask is not None:
        valid = mask.bool().flatten()
        rows = rows[0][valid], rows[1][valid], rows[2][valid]
    loss: torch.Tensor = _ChunkedDivergence.apply(*rows, float(ce), int(chunk))  # type: ignore[no-untyped-call]
    return loss
