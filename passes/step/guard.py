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
    """A look at every module of a model, taken before each step.

    What was last found fit is remembered as shallow copies of all the dictionaries involved, so
    that the next look is a few comparisons in C: as long as nothing was assigned, nothing changed.
    """

    watched: list[Watched] = field(default_factory=list)
    _fit: _Snapshot | None = field(default=None, repr=False, compare=False)

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
        if self._fit is not None and self._fit.still():
            return True
        self._fit = None
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
        if not all(w.module.__class__ is w.kind for w in self.watched[1:]):
            return False
        self._fit = _Snapshot([w.module for w in self.watched])
        return True

    def moved(self) -> bool:
        """Whether parameters or buffers lie elsewhere than when last asked; remembers where."""
        if self._fit is not None and self._fit.in_place():
            return False
        changed = False
        for w in self.watched:
            if w.places != (now := _places(w.module)):
                w.places, changed = now, True
        if self._fit is not None:
            self._fit.settle()
        return changed


class _Snapshot:
    """Dictionaries of modules as they are: equal ones hold the very same objects."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.kinds = [type(m) for m in modules]
        own = [m.__dict__ for m in modules]
        self.live: list[Any] = [*own, *(d[name] for d in own for name in _TABLES)]
        self.then = [dict(table) for table in self.live]
        self.tensors = [t for d in own for n in ("_parameters", "_buffers") for t in d[n].values()
                        if t is not None]  # fmt: skip
        self.places: list[int] | None = None

    def still(self) -> bool:
        """Whether nothing was assigned to any module. False also where it cannot be told."""
        try:
            return [type(m) for m in self.modules] == self.kinds and self.live == self.then
        except Exception:  # another tensor under a name: tensors compare number by number
            return False

    def in_place(self) -> bool:
        """Whether all tensors lie where they lay when `settle` was called."""
        return self.places is not None and [t.data_ptr() for t in self.tensors] == self.places

    def settle(self) -> None:
        self.places = [t.data_ptr() for t in self.tensors]


_TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def _idle(hooks: Iterable[Any]) -> bool:
    """Whether all hooks are those that transformers leaves behind once outputs were asked for.

    They do nothing in a call that asks for none, and other calls do not run as a step.
    """
    return all(getattr(h, "__module__", "") == _CAPTURING for h in hooks)


def _places(m: nn.Module) -> dict[str, int]:
    held = [(n, t) for table in (m._parameters, m._buffers) for n, t in table.items()]
    return {name: t.data_ptr() for name, t in held if t is not None}
