"""Which dimensions of an owner's inputs are batch or tokens, so that any call can be traced.

A call with batch 1 or one token must not be traced as it is: export specialises sizes 0 and 1; nor
must a call with a cache, whose mask is longer than its new tokens. The book has seen the same
inputs at two batches and two lengths and rebuilds the call at generic sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from rewriter.passes.realise.calls import Path, map_leaves, walk

Name = Literal["batch", "tokens", "source"]
Sizes = Mapping[Name, int]
GENERIC: Sizes = {"batch": 2, "tokens": 13, "source": 11}


@dataclass(frozen=True)
class Scaled:
    """A size that is `factor` times the batch, the tokens or those of a second sequence."""

    name: Name
    factor: int = 1


Label = Scaled | int


@dataclass
class SizeBook:
    """Labelled shapes by leaf path, learned from two observed calls."""

    labels: dict[Path, tuple[Label, ...]] = field(default_factory=dict)

    def learn(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        sizes: tuple[Sizes, Sizes],
    ) -> None:
        """Compare two calls made at the sizes sizes[0] and sizes[1]."""
        others = dict(walk(dict(second)))
        for path, value in walk(dict(first)):
            other = others.get(path)
            if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
                continue
            pairs = zip(value.shape, other.shape, strict=True)
            shape = tuple(int(a) if a == b else _scaled(a, b, sizes) for a, b in pairs)
            self.labels[path] = shape

    def fixed(self, tensors: Mapping[Path, torch.Tensor]) -> dict[str, frozenset[int]]:
        """Dimensions that did not change with batch or length, by the capture's input path.

        Args:
            tensors: of the call; what serves all rows elsewhere may be there for each row in it.
        """
        known = self._known(tensors)
        labels = {**self.labels}
        labels |= {p: self._now(p, t, known) for p, t in tensors.items() if p in labels}
        return {
            "kwargs." + ".".join(map(str, path)): frozenset(
                d for d, label in enumerate(shape) if not isinstance(label, Scaled)
            )
            for path, shape in labels.items()
        }

    def generic(
        self, named: Mapping[str, Any], tensors: Mapping[Path, torch.Tensor], own: bool = False
    ) -> dict[str, Any]:
        """The call with every tensor at generic sizes; values are kept where sizes agree.

        Args:
            own: batch and lengths above 1 stay what they are in this call.
        """
        known = self._known(tensors)
        cached = any(isinstance(value, Cache) for _, value in walk(dict(named)))
        if not cached and all(size > 1 for size in known.values()):
            return dict(named)
        made: dict[int, torch.Tensor] = {}
        wanted = {**GENERIC, **({n: s for n, s in known.items() if s > 1} if own else {})}

        def change(path: Path, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in made:
                made[id(value)] = self._rebuilt(path, value, known, wanted)
            return made[id(value)]

        return map_leaves(named, change)

    def _known(self, tensors: Mapping[Path, torch.Tensor]) -> dict[Name, int]:
        """Batch and lengths of a call."""
        known: dict[Name, int] = {}
        for path, tensor in tensors.items():
            for label, size in zip(self.labels.get(path, ()), tensor.shape, strict=False):
                if isinstance(label, Scaled):
                    known.setdefault(label.name, int(size) // label.factor)
        return known

    def _now(self, path: Path, value: torch.Tensor, known: Mapping[Name, int]) -> tuple[Label, ...]:
        """The labels of a tensor in this call: what served all rows may be there for each row."""
        labels = self.labels.get(path)
        if labels is None or len(labels) != value.dim():
            return tuple(_guess(d, n, value, known) for d, n in enumerate(value.shape))
        if labels and labels[0] == 1 and value.shape[0] == known.get("batch", 1) > 1:
            return Scaled("batch"), *labels[1:]
        return labels

    def _rebuilt(
        self, path: Path, value: torch.Tensor, known: Mapping[Name, int], wanted: Sizes
    ) -> torch.Tensor:
        labels = self._now(path, value, known)
        shape = [wanted[x.name] * x.factor if isinstance(x, Scaled) else x for x in labels]
        if value.dtype == torch.bool or not value.is_floating_point():
            return torch.ones(shape, dtype=value.dtype, device=value.device)
        return torch.randn(shape, device=value.device).to(value.dtype)


def _scaled(one: int, other: int, sizes: tuple[Sizes, Sizes]) -> Scaled:
    """Which size of the call grew like this one; tokens if none did."""
    for name, size in sizes[0].items():
        grown = sizes[1].get(name, size)
        if one % size == 0 and one // size * grown == other:
            return Scaled(name, one // size)
    return Scaled("tokens")


def _guess(dim: int, size: int, value: torch.Tensor, known: Mapping[Name, int]) -> Label:
    """Best reading of an input never seen before: first dimension batch, mask tails tokens."""
    if dim == 0 and size == known.get("batch", size):
        return Scaled("batch")
    lengths: list[Name] = [name for name in ("tokens", "source") if name in known] or ["tokens"]
    if value.dim() == 4 and dim >= 2:  # a mask: queries are tokens, keys may be another sequence
        return Scaled(lengths[0] if dim == 2 else lengths[-1])
    for name in lengths:
        if size == known.get(name) and size != 1:
            return Scaled(name)
    return int(size)
