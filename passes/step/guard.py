"""Whether the modules of a model are still what they were when its step was made."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_CAPTURING = "transformers.utils.output_capturing"


@dataclass
class Watched:
    """One module as it was: its class, its children, where its parameters and buffers lie."""

    module: nn.Module
    kind: type
    children: dict[str, nn.Module | None]
    places: dict[str, int]


@dataclass
class Guard:
    """A cheap look at every module of a model, taken before each step."""

    watched: list[Watched] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Guard:
        """What the modules are now. The class of the model itself may still become a subclass."""
        return cls([Watched(m, type(m), dict(m._modules), _places(m)) for m in model.modules()])

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        """Of the copied modules; a class that was made for a module is made anew for its copy."""
        watched = []
        for w in self.watched:
            module, children = copy.deepcopy((w.module, w.children), memo)
            kind = type(module) if type(w.module) is w.kind else w.kind
            watched.append(Watched(module, kind, children, dict(w.places)))
        return Guard(watched)

    def holds(self) -> bool:
        """No hooks, no training, no module added, exchanged or given another forward."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        for w in self.watched:
            m: Any = w.module
            if (
                m.training
                or m._forward_pre_hooks
                or (m._forward_hooks and not _idle(m._forward_hooks.values()))
                or "forward" in m.__dict__
                or m._modules != w.children
            ):
                return False
        return all(w.module.__class__ is w.kind for w in self.watched[1:])

    def moved(self) -> bool:
        """Whether parameters or buffers lie elsewhere than when last asked; remembers where."""
        changed = False
        for w in self.watched:
            if w.places and w.places != (now := _places(w.module)):
                w.places, changed = now, True
        return changed


def _idle(hooks: Iterable[Any]) -> bool:
    """Whether all hooks are those that transformers leaves behind once outputs were asked for.

    They do nothing in a call that asks for none, and other calls do not run as a step.
    """
    return all(getattr(h, "__module__", "") == _CAPTURING for h in hooks)


def _places(m: nn.Module) -> dict[str, int]:
    held = [(n, t) for table in (m._parameters, m._buffers) for n, t in table.items()]
    return {name: t.data_ptr() for name, t in held if t is not None}
