"""Calls of an owner module: their leaves, their pattern, and what probe runs saw of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from rewriter.passes.examples import Call

Path = tuple[str | int, ...]
TENSOR, CACHE, CONSTANT = "tensor", "cache", "constant"


@dataclass(frozen=True)
class Leaf:
    """One leaf of a call: where it is, what kind it is, and what must stay equal for a reuse.

    `key` is '' for a tensor of its own, the first position for a repeated tensor object, and the
    value for a constant.
    """

    path: Path
    kind: str
    key: Any


@dataclass(frozen=True)
class Pattern:
    """Everything about a call that its traced graph depends on, besides tensor sizes and values.

    `weights` says of each core whether it returns attention weights, `silent` whether it gives 0
    whatever it gets.
    """

    leaves: tuple[Leaf, ...]
    training: bool
    weights: tuple[bool, ...]
    silent: tuple[bool, ...]

    def describe(self) -> str:
        parts = [
            f"{_text(leaf.path)}={leaf.key if leaf.kind == CONSTANT else leaf.kind}"
            for leaf in self.leaves
        ]
        return ", ".join(parts) + (", training" if self.training else "")


def _text(path: Path) -> str:
    return ".".join(str(p) for p in path)


class Signature:
    """Reads calls of one forward signature into named leaves."""

    def __init__(self, forward: Any, method: bool = False):
        """Args: a bound forward, or with `method=True` the function of a class."""
        signature = inspect.signature(forward)
        names = list(signature.parameters.values())
        self.signature = signature.replace(parameters=names[1:] if method else names)
        self.any_number = next(
            (
                n
                for n, p in self.signature.parameters.items()
                if p.kind is inspect.Parameter.VAR_POSITIONAL
            ),
            None,
        )
        self.rest = next(
            (
                n
                for n, p in self.signature.parameters.items()
                if p.kind is inspect.Parameter.VAR_KEYWORD
            ),
            None,
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults filled in, variable keywords merged."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = dict(bound.arguments)
        if self.rest is not None:
            named.update(named.pop(self.rest))
        if self.any_number is not None and not named[self.any_number]:
            del named[self.any_number]
        return named


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Leaves of nested tuples, lists and dicts, with their paths; None is a leaf."""
    if isinstance(value, dict):
        for key in value:
            yield from walk(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from walk(item, (*path, position))
    else:
        yield path, value


def read(
    named: Mapping[str, Any],
    training: bool,
    weights: tuple[bool, ...],
    silent: tuple[bool, ...],
) -> tuple[Pattern, dict[Path, torch.Tensor], Any]:
    """The pattern of a call, its distinct tensors by path, and its cache object (or None)."""
    leaves: list[Leaf] = []
    tensors: dict[Path, torch.Tensor] = {}
    first: dict[int, int] = {}
    cache: Any = None
    for path, value in walk(dict(named)):
        if isinstance(value, torch.Tensor):
            at = first.setdefault(id(value), len(leaves))
            repeated = at != len(leaves)
            leaves.append(Leaf(path, TENSOR, at if repeated else ""))
            if not repeated:
                tensors[path] = value
        elif isinstance(value, Cache):
            cache = value
            leaves.append(Leaf(path, CACHE, ""))
        else:
            leaves.append(Leaf(path, CONSTANT, _constant(value)))
    return Pattern(tuple(leaves), training, weights, silent), tensors, cache


_SIMPLE = (str, int, float, bool, type(None), torch.dtype, torch.device)


class Held:
    """An object among the arguments, equal to itself alone. It is kept, so that no other object
    takes its address while a trace was made for it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__}>"


def _constant(value: Any) -> Any:
    return value if isinstance(value, _SIMPLE) else Held(value)


def made_anew(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Name of the class of an object that is another one in each call, which no trace can take."""
    later = dict(walk(dict(second)))
    for path, value in walk(dict(first)):
        if isinstance(value, (torch.Tensor, Cache, *_SIMPLE)):
            continue
        if value is not later.get(path):
            return type(value).__name__
    return None


def map_leaves(named: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """Copy of the named arguments with `change(path, value)` at every leaf."""

    def visit(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {k: visit(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, tuple | list):
            items = [visit(v, (*path, n)) for n, v in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return change(path, value)

    return {name: visit(value, (name,)) for name, value in named.items()}


@dataclass(frozen=True)
class Observed:
    """One observed call of an owner: its named arguments and its live output."""

    named: Mapping[str, Any]
    output: Any


def own_caches(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with copies of its caches, which a call changes."""
    if not any(isinstance(x, Cache) for _, x in walk(dict(named))):
        return dict(named)
    return map_leaves(named, lambda _, x: copy.deepcopy(x) if isinstance(x, Cache) else x)


def observe(model: nn.Module, owners: Sequence[str], call: Call) -> dict[str, list[Observed]]:
    """Run the model and note every call of the owner modules, by path, as it began."""
    seen: dict[str, list[Observed]] = {fqn: [] for fqn in owners}
    begun: dict[str, list[dict[str, Any]]] = {fqn: [] for fqn in owners}

    def before(fqn: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            begun[fqn].append(own_caches(Signature(module.forward).bind(args, kwargs)))

        return hook

    def after(fqn: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[fqn].append(Observed(begun[fqn].pop(), output))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for fqn in owners:
            module = model.get_submodule(fqn)
            early = module.register_forward_pre_hook(before(fqn), with_kwargs=True)
            stack.enter_context(removing(early))
            stack.enter_context(removing(module.register_forward_hook(after(fqn))))
        model(*call.args, **call.kwargs)
    return seen


class removing:  # noqa: N801 - a context manager in the style of contextlib.closing
    """Removes a hook at the end of a with block."""

    def __init__(self, handle: Any):
        self.handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
