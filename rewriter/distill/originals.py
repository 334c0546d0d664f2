"""The teacher's ordinary forward, with a look at what its rewritten modules are called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rewriter.distill.data import Rows
from rewriter.distill.stages import call, uncached
from rewriter.errors import UsageError
from rewriter.evaluate.scoring import evaluation_mode
from rewriter.mixers.base import Mixer
from rewriter.mixers.placed import mixers_of
from rewriter.mixers.tokens import Tokens
from rewriter.passes.compare import first_tensor, tensors_of

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
Visit = Callable[[str, Any, dict[str, Any], torch.Tensor], None]


class Calls(Protocol):
    """Where the calls of the teacher's modules come from."""

    @property
    def runs(self) -> Mapping[str, int]:
        """Calls of each module in one forward by path, as far as they are known."""
        ...

    def visit(self, rows: Rows, look: Visit) -> dict[str, int]:
        """Show every call of a batch: path, arguments, output; the number of calls by path."""
        ...


class _DoneSignal(Exception):  # noqa: N818 - control flow, not a failure
    """Every module has been called: the rest of the teacher's forward is not needed."""


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states among a module's outputs.

    Raises:
        UsageError: there is no tensor.
    """
    if not tensors_of(output):
        raise UsageError("A rewritten module returned no tensor, so its output cannot be matched.")
    return first_tensor(output)


def without_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with None in the place of caches."""
    return {k: None if k in CACHE_ARGUMENTS else v for k, v in kwargs.items()}


def tokens_of(core: Mixer, args: Any, kwargs: Mapping[str, Any]) -> Tokens:
    """What a mixer is given by a call of it."""
    return core.tokens(*args, **{k: v for k, v in kwargs.items() if k in ("terms", "hidden")})


def stated_runs(owners: Mapping[str, nn.Module]) -> dict[str, int]:
    """Calls of each module in one forward, as their sites say; one without a site is left out."""
    runs = {p: next((m.site.runs for m in mixers_of(o).values()), None) for p, o in owners.items()}
    return {path: count for path, count in runs.items() if count is not None}


class Originals:
    """Modules of the teacher, and how often each is called in one forward as far as is known.

    Attributes:
        runs: calls in one forward by path; where they are known of all modules nothing of the
            teacher runs behind the last of them, so that its logits, the largest tensor of all,
            are never made.
    """

    def __init__(self, teacher: nn.Module, owners: Mapping[str, nn.Module]):
        """Args: the teacher, and the student's modules by the path that both models have."""
        self.teacher = teacher
        self.paths = tuple(owners)
        self.runs = stated_runs(owners)

    def visit(self, rows: Rows, look: Visit) -> dict[str, int]:
        """One forward without gradients; `look` gets path, arguments and output of every call.

        Caches among the arguments are None.

        Returns:
            Calls of each module.

        Raises:
            UsageError: a module was never called, or returned no tensor.
        """
        calls = dict.fromkeys(self.paths, 0)
        total = sum(self.runs.values()) if len(self.runs) == len(self.paths) else None

        def hook_for(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                calls[path] += 1
                look(path, args, without_caches(kwargs), hidden_states(output))
                if total is not None and sum(calls.values()) >= total:
                    raise _DoneSignal

            return hook

        handles: list[RemovableHandle] = []
        try:
            for path in self.paths:
                original = self.teacher.get_submodule(path)
                handles.append(original.register_forward_hook(hook_for(path), with_kwargs=True))
            with torch.no_grad(), evaluation_mode(self.teacher), uncached(self.teacher):
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
            self.runs = dict(calls)
        return calls
