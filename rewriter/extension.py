"""What another package may add to the compiler, and how it is found.

| group | what | class |
|---|---|---|
| `attention_rewriter.rules` | an operator that the matcher looks through | `Transparent` |
| `attention_rewriter.anchors` | a normaliser of scores beside softmax | `Anchor` |
| `attention_rewriter.patterns` | a rewrite of compiled graphs | `GraphPattern` |

An entry point names an instance, or a class that is called without arguments. Each is loaded once.
What cannot be loaded, or fails later, is left out with one warning that names the package; nothing
crashes. Where several apply, the highest `priority` comes first, then the name. What they claim is
not believed: sites are proved after their rules were applied, patterns before they are.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, TypeVar

import torch
from torch import fx

from rewriter.errors import UsageError

RULES = "attention_rewriter.rules"
ANCHORS = "attention_rewriter.anchors"
PATTERNS = "attention_rewriter.patterns"


class _Extension(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def priority(self) -> int: ...


T = TypeVar("T", bound=_Extension)
R = TypeVar("R")


@dataclass(frozen=True)
class Transparent:
    """An operator that returns the values of its first argument, in the same shape and dtype.

    Attributes:
        operator: its name as torch prints it, `my_package::mark`.
        priority: see the module.
    """

    operator: str
    priority: int = 0

    @property
    def name(self) -> str:
        return self.operator


@dataclass(frozen=True)
class Reading:
    """A normaliser that ends at a node: what it normalises, and over which dimension (>= 0)."""

    scores: fx.Node
    dim: int


class Anchor(ABC):
    """A normaliser of attention scores beside softmax, where attention may begin.

    Attributes:
        name: written into the facts of a site (`AttentionSite.normaliser`).
        shift_invariant: the same number added to all scores of a row changes nothing.
    """

    name: str
    priority: int = 0
    shift_invariant: bool = False

    @abstractmethod
    def read(self, node: fx.Node) -> Reading | None:
        """The reading of a node that ends this normaliser; None for any other node."""

    @abstractmethod
    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """The normaliser over the last dimension; this is what a proof runs. Hidden is -inf."""


class GraphPattern(ABC):
    """A rewrite of the graphs of `torch.compile(backend="rewriter")`.

    Functions are traced on `examples`; sizes and numbers in them have to agree with the graph's.
    """

    name: str
    priority: int = 0

    @abstractmethod
    def examples(self) -> tuple[torch.Tensor, ...]:
        """Arguments to trace both functions with and to compare them on, gradients included."""

    @abstractmethod
    def pattern(self, *args: torch.Tensor) -> torch.Tensor:
        """What to look for."""

    @abstractmethod
    def replacement(self, *args: torch.Tensor) -> torch.Tensor:
        """The same function, as it should be."""

    def check(self, *inputs: fx.Node) -> str | None:
        """Why the pattern does not apply to these nodes, which stand for its arguments, or None."""
        return None


def rules() -> tuple[Transparent, ...]:
    """Installed transparent operators."""
    return _installed(RULES, Transparent)


def anchors() -> tuple[Anchor, ...]:
    """Installed normalisers."""
    return _installed(ANCHORS, Anchor)


def patterns() -> tuple[GraphPattern, ...]:
    """Installed graph patterns."""
    return _installed(PATTERNS, GraphPattern)


@lru_cache(maxsize=1)
def transparent_operators() -> frozenset[str]:
    return frozenset(rule.operator for rule in rules())


def anchor(name: str) -> Anchor:
    """The normaliser of that name. Raises UsageError if its package is not installed."""
    found = next((a for a in anchors() if a.name == name), None)
    if found is None:
        raise UsageError(
            f"attention here is normalised with '{name}', which no installed package defines; "
            f"install the one that registers it in the entry point group {ANCHORS}"
        )
    return found


def guarded(extension: _Extension, call: Callable[[], R], otherwise: R) -> R:
    """What the code of an extension returns, or `otherwise` and one warning if it fails."""
    try:
        return call()
    except Exception as error:  # code of others may fail in any way
        _warn(
            f"'{extension.name}' of {type(extension).__module__} failed with "
            f"{type(error).__name__}: {error}; it is left out"
        )
        return otherwise


def forget() -> None:
    """Look for installed extensions anew at the next use."""
    _installed.cache_clear()
    transparent_operators.cache_clear()
    _warn.cache_clear()


@lru_cache(maxsize=8)
def _installed(group: str, kind: type[T]) -> tuple[T, ...]:
    found: dict[str, tuple[T, str]] = {}
    for point in sorted(entry_points(group=group), key=lambda p: (_package(p), p.name)):
        loaded = _load(point, kind)
        if isinstance(loaded, str):
            _warn(loaded)
            continue
        other = found.setdefault(loaded.name, (loaded, _package(point)))[1]
        if other != _package(point):
            _warn(
                f"the packages '{other}' and '{_package(point)}' both register '{loaded.name}' in "
                f"{group}; that of '{other}' is used"
            )
    everything = (extension for extension, _ in found.values())
    return tuple(sorted(everything, key=lambda e: (-e.priority, e.name)))


def _load(point: EntryPoint, kind: type[T]) -> T | str:
    """The extension behind an entry point, or one sentence that says why there is none."""
    place = f"'{point.name}' of the package '{_package(point)}' ({point.value})"
    try:
        loaded = point.load()
        extension = loaded() if isinstance(loaded, type) else loaded
        usable = isinstance(extension, kind) and isinstance(extension.name, str)
    except Exception as error:  # a package may fail in any way while it is imported
        return f"{place} cannot be loaded: {type(error).__name__}: {error}; it is left out"
    if not usable:
        return f"{place} is no named {kind.__name__} of rewriter.extension; it is left out"
    assert isinstance(extension, kind)
    return extension


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(".")[0]


@lru_cache(maxsize=256)
def _warn(sentence: str) -> None:
    """Each sentence once."""
    warnings.warn(sentence, stacklevel=2)
