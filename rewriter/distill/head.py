"""The product that makes the logits, taken some tokens at a time: all of them are never in memory.

The linear layer whose output *is* a model's logits is found by a small call. While a stage runs,
that layer of both models hands its input through, and the loss multiplies rows of it, takes their
divergence, and turns the slope into gradients at once. Logits of `chunk` tokens of both models are
held, in memory that is kept from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewriter.backends.ops.divergence import divergence as rows_divergence
from rewriter.distill.data import Rows
from rewriter.distill.stages import call
from rewriter.errors import RewriterError, UsageError

_TOKENS = 4  # of the small call


@dataclass
class Heads:
    """The last layers of both models. `room` holds the logits of a chunk of tokens of each."""

    student: nn.Linear
    teacher: nn.Linear
    room: list[torch.Tensor] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, what the models return as logits is the input of their last layer."""
        kinds = [(head, head.__class__) for head in (self.student, self.teacher)]
        try:
            for head, _ in kinds:
                head.__class__ = _HandsThrough
            yield
        finally:
            for head, kind in kinds:
                head.__class__ = kind

    def divergence(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        ce: float,
        chunk: int,
    ) -> torch.Tensor:
        """`losses.divergence` of the logits that the layers make of (B, N, D) inputs.

        Args:
            student: gradients go to it and, where they train, to the student's weight and bias.
            teacher: None where `ce` is 1.
            mask, labels, ce: as there.
            chunk: tokens whose logits are held at once.
        """
        if labels is None:
            labels = torch.full(student.shape[:2], -1, dtype=torch.int64, device=student.device)
        rows = [None if x is None else x.flatten(0, 1) for x in (student, teacher)]
        labels = labels.flatten()
        if mask is not None:
            valid = mask.bool().flatten()
            rows, labels = [None if x is None else x[valid] for x in rows], labels[valid]
        own, other = self.student, self.teacher
        loss: torch.Tensor = _HeadDivergence.apply(  # type: ignore[no-untyped-call]
            *(rows[0], own.weight, own.bias, rows[1], other.weight, other.bias),
            *(labels, float(ce), int(chunk), self.room),
        )
        return loss


class _HandsThrough(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def heads_of(student: nn.Module, teacher: nn.Module, rows: Rows) -> Heads | None:
    """The last layers of two models, or None where something follows one of them.

    Args:
        student, teacher: private copies, whose logits are (B, N, V) each.
        rows: some text for the small call.
    """
    few = Rows(
        rows.ids[:1, :_TOKENS], None if rows.mask is None else rows.mask[:1, :_TOKENS] * 0 + 1
    )
    try:
        with torch.no_grad():
            pairs = [_head(model, few) for model in (student, teacher)]
            if any(head is None for head, _ in pairs):
                return None
            own, other = (head for head, _ in pairs if head is not None)
            heads = Heads(own, other)
            with heads.open():
                inputs = [logits_of(call(model, few)) for model in (student, teacher)]
            made = [own(inputs[0]), other(inputs[1])]
    except (RuntimeError, ValueError, TypeError, IndexError, RewriterError):
        return None  # somebody else needs the logits, or so few tokens are refused
    fits = own.weight.shape[0] == other.weight.shape[0]
    fits &= all(torch.allclose(a, b, 1e-3, 1e-3) for a, (_, b) in zip(made, pairs, strict=True))
    return heads if fits and all(x.shape[:2] == few.ids.shape for x in inputs) else None


def logits_of(output: Any) -> torch.Tensor:
    """The logits (batch, tokens, vocabulary) that a model returned.

    Raises:
        UsageError: it returned none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, torch.Tensor):
        logits = output
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise UsageError(
            "The model returns no (batch, tokens, vocabulary) logits, so the 'logits' stage cannot "
            "run: use the 'layers' stage alone."
        )
    return logits


def _head(model: nn.Module, rows: Rows) -> tuple[nn.Linear | None, torch.Tensor]:
    """The plain linear layer whose output a model returns as its logits, and these."""
    last: list[tuple[nn.Linear, torch.Tensor]] = []

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        last[:] = [(module, output)]

    plain = [m for m in model.modules() if type(m) is nn.Linear and not _hooked(m)]
    handles = [m.register_forward_hook(watch) for m in plain]
    try:
        logits = logits_of(call(model, rows))
    finally:
        for handle in handles:
            handle.remove()
    if not last or last[0][1] is not logits or type(last[0][0].weight) is not nn.Parameter:
        return None, logits
    return last[0][0], logits


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class _HeadDivergence(torch.autograd.Function):
    """Loss and gradients chunk by chunk; the slope of a chunk lies where its logits were."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher: torch.Tensor | None,
        teacher_weight: torch.Tensor,
        teacher_bias: torch.Tensor | None,
        labels: torch.Tensor,
        ce: float,
        chunk: int,
        room: list[torch.Tensor],
    ) -> torch.Tensor:
        count = max(1, student.shape[0])
        share = ce * count / max(1, int((labels >= 0).sum()))
        ours, theirs = _rooms(room, 1 if teacher is None else 2, chunk, student, weight)
        loss = torch.zeros((), dtype=torch.float64, device=student.device)
        of_rows = torch.empty_like(student)
        # Sums over chunks are float32, as they are inside a product.
        sums = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=sums) if ctx.needs_input_grad[1] else None
        of_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = torch.zeros_like(bias, dtype=sums)
        for start in range(0, student.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = student[part]
            logits = target = _product(rows, weight, bias, ours)
            if teacher is not None:
                target = _product(teacher[part], teacher_weight, teacher_bias, theirs)
            value, slope = rows_divergence(
                *(logits, target, labels[part], ce, share, chunk), count=count, into=logits
            )
            loss += value
            torch.mm(slope, weight, out=of_rows[part])
            if of_weight is not None:
                of_weight += slope.t() @ rows
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=sums)
        ctx.save_for_backward(of_rows, of_weight, of_bias)
        ctx.dtype = weight.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if x is None else x * grads[0].to(x.dtype) for x in ctx.saved_tensors]
        return *(None if x is None else x.to(ctx.dtype) for x in scaled), *[None] * 7


def _rooms(
    room: list[torch.Tensor], count: int, chunk: int, rows: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the logits of a chunk, once or twice; what `room` holds is used again."""
    tokens = min(chunk, rows.shape[0])
    if len(room) < count or room[0].shape[0] < tokens:
        room[:] = [weight.new_empty((tokens, weight.shape[0])) for _ in range(count)]
    return room[0], room[-1]


def _product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, room: torch.Tensor
) -> torch.Tensor:
    out = room[: rows.shape[0]]
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)
