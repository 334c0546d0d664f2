"""Stage 1: every rewritten module imitates its original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rewriter.distill.activations import OneModule
from rewriter.distill.attention import check_attention
from rewriter.distill.config import DistillConfig, LayerStage
from rewriter.distill.copies import (
    computes_in,
    core_rates,
    learning_names,
    private_copy,
    private_owners,
    rewritten_owners,
    write_core,
)
from rewriter.distill.data import Rows
from rewriter.distill.imitate import imitate
from rewriter.distill.originals import Calls, Originals
from rewriter.distill.precision import compute_dtype
from rewriter.distill.sharding import shard, size
from rewriter.distill.stages import Losses, Ready, dropping
from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer


class MatchLayers:
    """Stage 1: every rewritten module imitates its original on the teacher's own stream.

    The teacher runs its ordinary forward. After each original module a hook calls the student's
    module on the same inputs and runs backward at once, so that the memory of one layer is enough
    and layers do not disturb each other. With `ready` a layer also takes its step of the optimiser
    there, so that the gradients of one layer are enough.
    """

    name = "layers"

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig,
        stored: OneModule | None = None,
    ):
        """Args:
        teacher, student: the models as given; they are not changed.
        config: the settings.
        stored: calls of one module on disk: it alone trains, and the teacher is not called.
        """
        assert config.layers is not None
        self.options: LayerStage = config.layers
        learning = learning_names(student)
        if not learning:
            raise UsageError(
                "No rewritten module has new parameters, so there is nothing to match layer by "
                "layer: leave out the 'layers' stage or choose a mixer that learns."
            )
        if stored is not None:
            learning = {stored.path: learning[stored.path]}
        names = list(dict.fromkeys(name for names in learning.values() for name in names))
        dtype = compute_dtype(config.dtype, teacher)
        tensors: dict[int, torch.Tensor] = {}
        self.teacher = teacher
        if stored is None and not computes_in(teacher, dtype):
            self.teacher = private_copy(teacher, dtype, tensors)
        self.student = private_owners(student, learning, dtype, tensors, names)
        for name in names:
            self.student.get_parameter(name).requires_grad_(True)
        shard(self.student, names)
        self.core = {n: self.student.get_parameter(n) for n in names}
        self.rates = core_rates(self.student)
        self.body: dict[str, nn.Parameter] = {}
        self.owners = {path: self.student.get_submodule(path) for path in learning}
        self.groups = [learning[path] for path in self.owners]
        self.cores: dict[str, list[Mixer]] = {path: [] for path in self.owners}
        if self.options.attention is not None:
            self._state_attention()
        self._calls: Calls = stored or Originals(self.teacher, self.owners)

    def backward(self, rows: Rows, scale: float, ready: Ready | None = None) -> Losses:
        with dropping(self.student, self.options.drop_window):
            return self._backward(rows, scale, ready)

    def _backward(self, rows: Rows, scale: float, ready: Ready | None) -> Losses:
        parts: dict[str, float] = {}
        calls: dict[str, int] = dict.fromkeys(self.owners, 0)
        numbers = {path: number for number, path in enumerate(self.owners)}

        def look(path: str, args: Any, kwargs: dict[str, Any], target: torch.Tensor) -> None:
            with torch.enable_grad():
                loss = self._learn(path, args, kwargs, target, rows.mask, scale)
            calls[path] += 1
            parts[path] = parts.get(path, 0.0) + (loss - parts.get(path, 0.0)) / calls[path]
            if ready is not None and calls[path] == self._calls.runs.get(path):
                with torch.enable_grad():
                    ready(numbers[path])

        self._calls.visit(rows, look)
        return Losses(sum(parts.values()) / len(parts), parts)

    def _state_attention(self) -> None:
        """Find the cores that learn from attention weights.

        Raises:
            UsageError: a module has none, or one that cannot, or there are several processes.
        """
        if size() > 1:
            raise UsageError(
                "Losses on attention weights are computed in one process only: leave out "
                "'attention' of the stage 'layers', or train in one process."
            )
        rewritten = rewritten_owners(self.student)
        for path in self.owners:
            found = [c for c in rewritten.get(path, {}).values() if list(c.parameters())]
            self.cores[path] = found
            for core in found:
                check_attention(core)
            if not found and self.options.output == 0:
                raise UsageError(
                    f"'{path}' has no attention weights to learn, and the outputs have no weight: "
                    "give 'output' of the stage 'layers' a weight."
                )

    def _learn(
        self,
        path: str,
        args: Any,
        kwargs: dict[str, Any],
        target: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> float:
        """Run one of the student's modules on the teacher's input, and backward; its loss."""
        owner, cores = self.owners[path], self.cores[path]
        return imitate(owner, cores, self.options, args, kwargs, target, mask, scale)

    def write(self, values: Mapping[str, torch.Tensor], student: nn.Module) -> None:
        write_core(student, values)
