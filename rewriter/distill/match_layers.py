"""Stage 1: every rewritten module imitates its original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rewriter.distill.attention import attention_losses, check_attention
from rewriter.distill.config import DistillConfig, LayerStage
from rewriter.distill.copies import (
    core_names,
    core_rates,
    learning_owners,
    private_copy,
    rewritten_owners,
    write_core,
)
from rewriter.distill.data import Rows
from rewriter.distill.losses import output_error
from rewriter.distill.precision import compute_dtype
from rewriter.distill.sharding import shard, size
from rewriter.distill.stages import Losses, call, dropping
from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer
from rewriter.mixers.placed import mixers_of
from rewriter.mixers.tokens import Tokens
from rewriter.passes.compare import first_tensor, tensors_of

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states among a module's outputs."""
    if not tensors_of(output):
        raise UsageError("A rewritten module returned no tensor, so its output cannot be matched.")
    return first_tensor(output)


def _expected(owners: Sequence[nn.Module]) -> int | None:
    """Calls of these modules in one forward, as their sites say; None where one has no site."""
    runs = [next((m.site.runs for m in mixers_of(owner).values()), None) for owner in owners]
    return None if None in runs else sum(n for n in runs if n is not None)


class _DoneSignal(Exception):  # noqa: N818 - control flow, not a failure
    """The rest of a forward is not needed: what it was run for has been called."""


class MatchLayers:
    """Stage 1: every rewritten module imitates its original on the teacher's own stream.

    The teacher runs its ordinary forward. After each original module a hook calls the student's
    module on the same inputs and runs backward at once, so that the memory of one layer is enough
    and layers do not disturb each other.
    """

    name = "layers"

    def __init__(self, teacher: nn.Module, student: nn.Module, config: DistillConfig):
        """Args: the models as given (they are not changed) and the settings."""
        assert config.layers is not None
        self.options: LayerStage = config.layers
        names = core_names(student)
        if not names:
            raise UsageError(
                "No rewritten module has new parameters, so there is nothing to match layer by "
                "layer: leave out the 'layers' stage or choose a mixer that learns."
            )
        dtype = compute_dtype(config.dtype, teacher)
        tensors: dict[int, torch.Tensor] = {}
        self.teacher = private_copy(teacher, dtype, tensors)
        self.student = private_copy(student, dtype, tensors, master=names)
        for name in names:
            self.student.get_parameter(name).requires_grad_(True)
        shard(self.student, names)
        self.core = {n: self.student.get_parameter(n) for n in names}
        self.rates = core_rates(self.student)
        self.body: dict[str, nn.Parameter] = {}
        learning = {
            path: [f"{at}.{n}" for at, core in cores.items() for n, _ in core.named_parameters()]
            for path, cores in learning_owners(self.student).items()
        }
        self.owners = {
            path: self.student.get_submodule(path) for path in learning if learning[path]
        }
        self.groups = [learning[path] for path in self.owners]
        self.cores: dict[str, list[Mixer]] = {path: [] for path in self.owners}
        if self.options.attention is not None:
            self._state_attention()
        # calls of rewritten modules in one forward, where known: behind the last of them nothing
        # of the teacher runs, so that its logits, the largest tensor of all, are never made
        self._calls = _expected(list(self.owners.values()))

    def backward(self, rows: Rows, scale: float) -> Losses:
        with dropping(self.student, self.options.drop_window):
            return self._backward(rows, scale)

    def _backward(self, rows: Rows, scale: float) -> Losses:
        parts: dict[str, float] = {}
        calls: dict[str, int] = dict.fromkeys(self.owners, 0)

        def hook_for(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                clean = {k: None if k in CACHE_ARGUMENTS else v for k, v in kwargs.items()}
                with torch.enable_grad():
                    loss = self._learn(path, args, clean, _hidden(output), rows.mask, scale)
                calls[path] += 1
                parts[path] = parts.get(path, 0.0) + (loss - parts.get(path, 0.0)) / (calls[path])
                if self._calls is not None and sum(calls.values()) >= self._calls:
                    raise _DoneSignal

            return hook

        handles: list[RemovableHandle] = []
        try:
            for path in self.owners:
                original = self.teacher.get_submodule(path)
                handles.append(original.register_forward_hook(hook_for(path), with_kwargs=True))
            with torch.no_grad():
                call(self.teacher, rows)
        except _DoneSignal:
            pass
        finally:
            for handle in handles:
                handle.remove()
        silent = [path for path, count in calls.items() if count == 0]
        if silent:
            raise UsageError(
                f"The teacher's forward never called '{silent[0]}', so it cannot be matched: "
                "leave it out of the policy."
            )
        if all(count == 1 for count in calls.values()):
            self._calls = len(calls)
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
        options, given = self.options, dict[Mixer, Tokens]()

        cores = self.cores[path]

        def keep(core: Mixer, args: Any, kwargs: dict[str, Any]) -> None:
            wanted = {k: v for k, v in kwargs.items() if k in ("terms", "hidden")}
            given[core] = core.tokens(*args, **wanted)
            if options.output == 0 and len(given) == len(cores):
                raise _DoneSignal  # no output is wanted

        handles = [c.register_forward_pre_hook(keep, with_kwargs=True) for c in cores]
        value = 0.0
        try:
            with torch.set_grad_enabled(options.output > 0):
                out = _hidden(self.owners[path](*args, **kwargs))
            if options.output > 0:
                loss = options.output * output_error(out, target, mask)
                torch.autograd.backward(loss * scale)
                value += loss.item()
            del out
        except _DoneSignal:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for core, x in given.items():
            assert options.attention is not None
            weight = options.attention_weight / len(given)
            for share in attention_losses(
                core, x, options.attention, options.attention_rows, options.attention_queries
            ):
                torch.autograd.backward(share * (weight * scale))
                value += weight * share.item()
        return value

    def write(self, values: Mapping[str, torch.Tensor], student: nn.Module) -> None:
        write_core(student, values)
