"""Stage 2: the whole student imitates the teacher's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn

from rewriter.distill.borrowed import quicken
from rewriter.distill.config import DistillConfig, LogitStage
from rewriter.distill.copies import (
    core_names,
    core_rates,
    private_copy,
    replacer,
    write_body,
    write_core,
)
from rewriter.distill.data import Rows
from rewriter.distill.head import Heads, heads_of, logits_of
from rewriter.distill.lora import inject_lora
from rewriter.distill.losses import divergence
from rewriter.distill.precision import compute_dtype
from rewriter.distill.sharding import as_sharded, shard, size, whole
from rewriter.distill.stages import Losses, Ready, call, dropping
from rewriter.distill.within import Within
from rewriter.errors import UsageError


class MatchLogits:
    """Stage 2: the whole student imitates the teacher: its predictions, or what is inside it."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig,
        which: Literal["logits", "long"] = "logits",
    ):
        """Args: the models as given (they are not changed), the settings, and which stage it is."""
        options = config.logits if which == "logits" else config.long
        assert options is not None
        self.name: str = which
        self.options: LogitStage = options
        self._original, self._given = teacher, student
        names = core_names(student)
        dtype = compute_dtype(config.dtype, teacher)
        body = []
        if self.options.train == "all":
            body = [n for n, p in student.named_parameters() if p.is_floating_point()]
            body = [n for n in body if n not in set(names)]
        tensors: dict[int, torch.Tensor] = {}
        self.teacher = private_copy(teacher, dtype, tensors)
        self.student = private_copy(student, dtype, tensors, master=names, own=body)
        self._lora: dict[str, Any] = {}
        if self.options.train == "lora":
            self._lora = inject_lora(self.student, self.options, config.seed)
            body = [n for n, _ in self.student.named_parameters() if ".lora_" in n]
        if not names and not body:
            raise UsageError(
                "Nothing would train: the rewritten modules have no new parameters, so choose "
                f"train 'lora' or 'all' for the '{which}' stage."
            )
        trained = {*names, *body}
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in trained)
        shard(self.student, trained)
        self.core = {n: self.student.get_parameter(n) for n in names}
        self.rates = core_rates(self.student)
        self.body = {n: self.student.get_parameter(n) for n in body}
        self.groups = [[*self.core, *self.body]]
        self._heads: Heads | Literal["unknown"] | None = "unknown"
        self._within: Within | None = None
        if self.options.hidden > 0 or self.options.relations is not None:
            self._within = Within(self.teacher, self.student, student, self.options)

    def backward(self, rows: Rows, scale: float, ready: Ready | None = None) -> Losses:
        options, within = self.options, self._within
        if self._heads == "unknown":
            quicken(self.teacher, self.student, self._given, rows)
            self._heads = self._found_heads(rows) if options.divergence > 0 else None
        heads = self._heads
        teaches = within is not None or (options.divergence > 0 and options.ce < 1)
        target = None
        with nullcontext() if heads is None else heads.open():
            with (
                dropping(self.student, options.drop_window),
                nullcontext() if within is None else within.student_runs(),
            ):
                out = call(self.student, rows)
            if teaches:  # with the cross-entropy alone no teacher is needed
                around = nullcontext() if within is None else within.teacher_runs(self.teacher)
                with torch.no_grad(), around:
                    target = call(self.teacher, rows)
        parts: list[torch.Tensor] = []
        if options.divergence > 0:
            parts.append(options.divergence * self._on_logits(rows, out, target))
        if within is not None:
            parts.append(within.loss(rows.mask))
        del out, target
        loss = torch.stack(parts).sum()
        torch.autograd.backward(loss * scale)
        return Losses(loss.item(), {})

    def _on_logits(self, rows: Rows, output: Any, teacher_output: Any) -> torch.Tensor:
        options, heads = self.options, self._heads
        labels = None
        if options.ce > 0:
            labels = torch.full_like(rows.ids, -1)
            labels[:, :-1] = rows.ids[:, 1:]
            if rows.mask is not None:
                labels[:, :-1][rows.mask[:, 1:] == 0] = -1
        out = logits_of(output)
        target = None if options.ce == 1 else logits_of(teacher_output)
        if isinstance(heads, Heads):
            return heads.divergence(out, target, rows.mask, labels, options.ce, options.chunk)
        target = out if target is None else target
        return divergence(out, target, rows.mask, labels, options.ce, options.chunk)

    def _found_heads(self, rows: Rows) -> Heads | None:
        if size() > 1 and self.options.train == "all":
            return None  # the weight is sharded with the model around it
        return heads_of(self.student, self.teacher, rows)

    def write(self, values: Mapping[str, torch.Tensor], student: nn.Module) -> None:
        write_core(student, {n: values[n] for n in self.core})
        if self._lora:
            with torch.no_grad():
                for name in self.body:
                    self.body[name].copy_(as_sharded(values[name], self.body[name]))
            update = {
                f"{path}.weight": _merger(layer.get_delta_weight("default"))
                for path, layer in self._lora.items()
            }
            write_body(student, self._original, update)
        elif self.body:
            write_body(student, self._original, {n: replacer(values[n]) for n in self.body})


def _merger(delta: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    full = whole(delta.detach()).float()
    return lambda old: old + full
