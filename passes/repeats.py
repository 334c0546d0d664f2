"""Which modules of a model compute the same function, so that one capture serves them all.

A trained model repeats its layers. Modules that look alike (same classes, shapes and dtypes) are
watched while the model runs on small inputs of two sizes: what each of them calls, with which
arguments, on which tensors. Two with equal records are the same program on other parameters.
Whatever the records cannot show (state kept in attributes, values read out of tensors, results
that leave by another way than the return value) excludes a module, and it is captured in full.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from rewriter.passes import torch_private

SHORTEST = 30
"""Modules with fewer events (about ten operators) are traced faster than they are copied."""

_DEPTH = 3
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_VALUES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def repeated(module: nn.Module, calls: Sequence[Call]) -> tuple[tuple[str, ...], ...]:
    """Groups of at least two modules that compute the same function of inputs and parameters.

    Args:
        module: the model; buffers and random state are left as they were.
        calls: (args, kwargs) of the same call at two sizes or more.

    Returns:
        Module paths by group, each group in the order it runs; no module lies inside another one
        and each runs exactly once per call. Empty if a call fails.
    """
    found: list[tuple[str, ...]] = []
    candidates = _look_alikes(module, list(dict(module.named_children())))
    for _ in range(_DEPTH):
        if not candidates:
            break
        records = [_watch(module, candidates, call) for call in calls]
        if any(record is None for record in records):
            break
        classes: dict[Any, list[str]] = defaultdict(list)
        for path in (p for p in (records[0] or {}) if all(p in (r or {}) for r in records)):
            key = tuple((r or {})[path] for r in records)
            if len(key[0].events) >= SHORTEST:
                classes[key].append(path)
        found += [tuple(paths) for paths in classes.values() if len(paths) > 1]
        done = {path for group in found for path in group}
        inner = [
            f"{path}.{name}"
            for path in candidates
            if path not in done
            for name, _ in module.get_submodule(path).named_children()
        ]
        candidates = _look_alikes(module, inner)
    return tuple(found)


def _look_alikes(module: nn.Module, below: Sequence[str]) -> list[str]:
    """Outermost modules at or below these paths that have a structural twin among them."""
    count: Counter[Any] = Counter()
    structures: dict[str, Any] = {}
    tied = _tied(module)
    for start in below:
        for inner, child in module.get_submodule(start).named_modules():
            path = f"{start}.{inner}" if inner else start
            own = None if "forward" in child.__dict__ else _structure(child, tied)
            structures[path] = own
            count[own] += own is not None
    out: list[str] = []
    for path, structure in structures.items():  # parents come before their children
        twin = structure is not None and count[structure] > 1
        if twin and not any(path.startswith(f"{other}.") for other in out):
            out.append(path)
    return out


def _tied(module: nn.Module) -> frozenset[int]:
    tensors = (
        *(p for _, p in module.named_parameters(remove_duplicate=False)),
        *(b for _, b in module.named_buffers(remove_duplicate=False)),
    )
    modules = (m for _, m in module.named_modules(remove_duplicate=False))
    counts = Counter(id(x) for x in (*tensors, *modules))
    return frozenset(key for key, number in counts.items() if number > 1)


def _structure(module: nn.Module, tied: frozenset[int]) -> Any:
    """What two modules must share to be compared at all; None for one that shares its parts."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        if id(child) in tied:
            return None
        hooks = len(child._forward_hooks), len(child._forward_pre_hooks)
        parts.append((name, type(child), child.training, hooks))
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            if id(tensor) in tied:
                return None
            parts.append((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
    if len(parts) == 1 and not next(iter(module.children()), None):
        return None  # an activation function, say
    return tuple(parts)


@dataclass
class Record:
    """What one module did in one call; equal records are equal programs on these sizes."""

    events: list[Any] = field(default_factory=list)

    def __hash__(self) -> int:
        return hash(tuple(self.events))


@dataclass
class _Frame:
    """A candidate that is running."""

    path: str
    record: Record
    inside: WeakTensorKeyDictionary
    inputs: WeakTensorKeyDictionary
    names: Mapping[int, str]
    state: Any


class _Watcher:
    """Collects the records of all candidates in one run of the model."""

    def __init__(self, module: nn.Module, candidates: Sequence[str]):
        self.root = module
        self.records: dict[str, Record] = {}
        self.refused: set[str] = set()
        self.frame: _Frame | None = None
        self.made_by = WeakTensorKeyDictionary()
        self.others: dict[int, torch.Tensor] = {}
        self.candidates = candidates

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        if self.frame is not None or path in self.records:  # runs inside another one, or again
            self.refused.add(path)
            if self.frame is not None:
                self.refused.add(self.frame.path)
            return
        module = self.root.get_submodule(path)
        tensors = (*module.named_parameters(), *module.named_buffers())
        record = self.records[path] = Record()
        self.frame = _Frame(
            path,
            record,
            WeakTensorKeyDictionary(),
            WeakTensorKeyDictionary(),
            {id(t): name for name, t in tensors},
            _attributes(module),
        )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf not in self.frame.inputs:
                self._used(leaf)
                self.frame.inputs[leaf] = number
        record.events.append(("called with", str(spec), *(self._item(x) for x in leaves)))

    def leave(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        frame = self.frame
        if frame is None or frame.path != path:
            return
        leaves, spec = pytree.tree_flatten(output)
        frame.record.events.append(("returns", str(spec), *(self._item(x) for x in leaves)))
        before = frame.record.events[0]
        passed = pytree.tree_leaves((args, kwargs))
        if len(passed) != len(before) - 2 or _attributes(self.root.get_submodule(path)) != (
            frame.state
        ):
            self.refused.add(path)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                self.made_by[leaf] = ""
        self.frame = None

    def called(self, what: Any, args: Any, kwargs: Any) -> None:
        """An operator or function runs; its results are noted by `made`."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                self._used(leaf)
        if self.frame is not None:
            items = tuple(self._item(x) for x in leaves)
            self.frame.record.events.append((what, str(spec), *items))

    def made(self, result: Any) -> None:
        if self.frame is None:
            return
        number = len(self.frame.record.events)
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, torch.Tensor) and leaf not in self.frame.inside:
                known = leaf in self.frame.inputs or id(leaf) in self.frame.names
                if not known and id(leaf) not in self.others:
                    self.frame.inside[leaf] = (number, position)
                    self.made_by[leaf] = self.frame.path

    def refuse(self) -> None:
        if self.frame is not None:
            self.refused.add(self.frame.path)

    def _used(self, tensor: torch.Tensor) -> None:
        """A result that is used elsewhere although its module did not return it has leaked."""
        if tensor in self.made_by:
            maker = self.made_by[tensor]
            if maker and (self.frame is None or self.frame.path != maker):
                self.refused.add(maker)

    def _item(self, leaf: Any) -> Any:
        frame = self.frame
        assert frame is not None
        if isinstance(leaf, torch.Tensor):
            kind = (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
            for name, known in (("made", frame.inside), ("input", frame.inputs)):
                if leaf in known:
                    return (name, known[leaf], kind)
            if id(leaf) in frame.names:
                return ("own", frame.names[id(leaf)], kind)
            self.others[id(leaf)] = leaf  # kept alive, so that the id stays its own
            return ("other", id(leaf), kind)
        if isinstance(leaf, _PLAIN):
            return (type(leaf), repr(leaf))
        if isinstance(leaf, torch.Size):
            return tuple(leaf)
        if isinstance(leaf, slice):
            return ("slice", *(self._item(x) for x in (leaf.start, leaf.stop, leaf.step)))
        if leaf is Ellipsis or isinstance(leaf, torch.memory_format | torch.layout):
            return repr(leaf)
        self.refuse()
        return None


def _attributes(module: nn.Module) -> Any:
    """Identity of everything that the modules hold, plain values by value."""
    skipped = ("_parameters", "_buffers", "_modules", "forward")
    return [
        (key, repr(value) if isinstance(value, _PLAIN) else id(value))
        for child in module.modules()
        for key, value in (*child.__dict__.items(), *child._buffers.items())
        if key not in skipped
    ]


class _Functions(TorchFunctionMode):
    """Notes calls as they are written: before composite operators are taken apart."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.watcher.frame is not None:
            self.watcher.called(getattr(func, "__qualname__", str(func)), args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators and which tensors flow between them."""

    def __init__(self, watcher: _Watcher):
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher = watcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _VALUES:
            self.watcher.refuse()
        self.watcher.called(str(func), args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.watcher.made(result)
        return result


def _watch(module: nn.Module, candidates: Sequence[str], call: Call) -> dict[str, Record] | None:
    """Records of the candidates that a record can describe, or None if the model fails."""
    watcher = _Watcher(module, candidates)
    args, kwargs = call
    with ExitStack() as stack:
        stack.enter_context(_unchanged(module))
        for path in candidates:
            stack.enter_context(_watched(module.get_submodule(path), path, watcher))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(watcher))
        stack.enter_context(_Operators(watcher))
        try:
            output = module(*args, **kwargs)
        except Exception:  # the capture will say what is wrong with the model
            return None
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                watcher._used(leaf)
    return {p: r for p, r in watcher.records.items() if p not in watcher.refused}


@contextmanager
def _watched(module: nn.Module, path: str, watcher: _Watcher) -> Iterator[None]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch_private.unwatched():
            watcher.enter(path, args, kwargs)
        output = original(*args, **kwargs)
        with torch_private.unwatched():
            watcher.leave(path, args, kwargs, output)
        return output

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put buffers and the random state back afterwards; training forwards write to them."""
    before = [(b, b.detach().clone()) for b in module.buffers() if not b.is_meta]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    if not torch.equal(buffer, value):  # the version does not tell in every case
                        buffer.copy_(value)
