"""Losses inside the models while the whole student trains: hidden states and relations.

Both models run their own forward. Hooks keep the outputs of the rewritten modules, and the queries,
keys and values of one of them. The teacher has no mixer to look into, so these come from a reader:
a copy of the student's module with the teacher's parameters, on the teacher's input, that stops
where its mixer begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rewriter.distill.borrowed import borrowed
from rewriter.distill.config import LogitStage
from rewriter.distill.copies import rewritten_owners
from rewriter.distill.losses import output_error
from rewriter.distill.originals import hidden_states, tokens_of, without_caches
from rewriter.distill.relations import relation_error
from rewriter.distill.sharding import size
from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer
from rewriter.mixers.tokens import Tokens


class _ReadSignal(Exception):  # noqa: N818 - control flow, not a failure
    """The mixer was reached: what it was given is known."""


class Within:
    """What one batch showed inside both models, and the losses on it.

    Use `student_runs` around the student's forward, `teacher_runs` around the teacher's, then
    `loss` once.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, given: nn.Module, options: LogitStage
    ):
        """Args: private copies of both models, the student as it was given, and the settings.

        Raises:
            UsageError: a module runs several times, or cannot be read, or there are several
                processes.
        """
        if size() > 1:
            raise UsageError(
                "Losses on hidden states and relations are computed in one process only: leave out "
                "'hidden' and 'relations' of the stage 'logits', or train in one process."
            )
        self.student, self.options = student, options
        owners = rewritten_owners(student)
        self.paths = list(owners)
        if not self.paths:
            raise UsageError(
                "No module is rewritten, so there are no hidden states or relations to match: "
                "leave out 'hidden' and 'relations' of the stage 'logits'."
            )
        self._ours: dict[str, torch.Tensor] = {}
        self._theirs: dict[str, torch.Tensor] = {}
        self._tokens: list[Tokens] = []
        self._wanted: list[Tokens] = []
        self.core: Mixer | None = None
        if options.relations is not None:
            self.path = self._chosen(options.relations.layer)
            self.core = next(iter(owners[self.path].values()))
            if self.core.site.cross or self.core.site.runs > 1:
                raise UsageError(
                    f"Relations are between the tokens of one sequence, and '{self.path}' is cross "
                    "attention or runs several times: choose another 'layer' of 'relations'."
                )
            self.reader = borrowed(given, teacher, self.path)

    def _chosen(self, layer: int) -> str:
        if not -len(self.paths) <= layer < len(self.paths):
            raise UsageError(
                f"There is no rewritten module {layer}, only {len(self.paths)} of them: choose "
                "another 'layer' of 'relations'."
            )
        return self.paths[layer]

    @contextmanager
    def student_runs(self) -> Iterator[None]:
        """Around the student's forward."""
        self._ours.clear()
        self._tokens.clear()
        with ExitStack() as stack:
            if self.options.hidden > 0:
                for path in self.paths:
                    module = self.student.get_submodule(path)
                    handle = module.register_forward_hook(self._keeper(self._ours, path))
                    stack.callback(handle.remove)
            if self.core is not None:
                handle = self.core.register_forward_pre_hook(self._seen, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @contextmanager
    def teacher_runs(self, teacher: nn.Module) -> Iterator[None]:
        """Around the teacher's forward, or that of a model with the same module paths."""
        self._theirs.clear()
        self._wanted.clear()
        with ExitStack() as stack:
            if self.options.hidden > 0:
                for path in self.paths:
                    module = teacher.get_submodule(path)
                    handle = module.register_forward_hook(self._keeper(self._theirs, path))
                    stack.callback(handle.remove)
            if self.core is not None:
                module = teacher.get_submodule(self.path)
                handle = module.register_forward_pre_hook(self._read, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @staticmethod
    def _keeper(into: dict[str, torch.Tensor], path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if path in into:
                raise UsageError(
                    f"'{path}' runs several times in a forward, so its hidden states cannot be "
                    "matched: leave out 'hidden' of the stage 'logits'."
                )
            into[path] = hidden_states(output)

        return keep

    def _seen(self, core: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert isinstance(core, Mixer)
        self._tokens.append(tokens_of(core, args, kwargs))

    def _read(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        def stop(core: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            assert isinstance(core, Mixer)
            self._wanted.append(tokens_of(core, args, kwargs))
            raise _ReadSignal

        core = next(m for m in self.reader.modules() if isinstance(m, Mixer))
        handle = core.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.reader(*args, **without_caches(kwargs))
        except _ReadSignal:
            pass
        finally:
            handle.remove()

    def loss(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The weighted sum, a float32 scalar; what was kept is let go.

        Args:
            mask: (B, N), zero at padding.
        """
        total = torch.zeros(())
        if self.options.hidden > 0:
            errors = [output_error(self._ours[p], self._theirs[p], mask) for p in self.paths]
            total = total + self.options.hidden * torch.stack(errors).mean()
        relations = self.options.relations
        if self.core is not None and relations is not None:
            (ours,), (theirs,) = self._tokens, self._wanted
            causal = self.core.site.kind == "causal"
            total = total + relations.weight * relation_error(ours, theirs, relations, causal)
        for kept in (self._ours, self._theirs, self._tokens, self._wanted):
            kept.clear()
        return total
