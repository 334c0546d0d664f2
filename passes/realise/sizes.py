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

Name = Literal["batch", "tokens"]
GENERIC: Mapping[Name, int] = {"batch": 2, "tokens": 13}


@dataclass(frozen=True)
class Scaled:
    """A size that is `factor` times the batch or the number of tokens."""

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
        sizes: tuple[tuple[int, int], tuple[int, int]],
    ) -> None:
        """Compare two calls made at (batch, tokens) = sizes[0] and sizes[1]."""
        others = dict(walk(dict(second)))
        (batch, tokens), (other_batch, other_tokens) = sizes
        for path, value in walk(dict(first)):
            other = others.get(path)
            if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
                continue
            shape: list[Label] = []
            for a, b in zip(value.shape, other.shape, strict=True):
                if a == b:
                    shape.append(int(a))
                elif a % batch == 0 and a // batch * other_batch == b:
                    shape.append(Scaled("batch", a // batch))
                elif a % tokens == 0 and a // tokens * other_tokens == b:
                    shape.append(Scaled("tokens", a // tokens))
                else:
                    shape.append(Scaled("tokens"))
            self.labels[path] = tuple(shape)

    def fixed(self) -> dict[str, frozenset[int]]:
        """Dimensions that did not change with batch or length, by the capture's input path."""
        return {
            "kwargs." + ".".join(map(str, path)): frozenset(
                d for d, label in enumerate(labels) if not isinstance(label, Scaled)
            )
            for path, labels in self.labels.items()
        }

    def generic(
        self, named: Mapping[str, Any], tensors: Mapping[Path, torch.Tensor]
    ) -> dict[str, Any]:
        """The call with every tensor at generic sizes; values are kept where sizes agree."""
        known: dict[str, int] = {}
        for path, tensor in tensors.items():
            for label, size in zip(self.labels.get(path, ()), tensor.shape, strict=False):
                if isinstance(label, Scaled):
                    known.setdefault(label.name, int(size) // label.factor)
        cached = any(isinstance(value, Cache) for _, value in walk(dict(named)))
        if not cached and known.get("batch", 2) > 1 and known.get("tokens", 2) > 1:
            return dict(named)
        made: dict[int, torch.Tensor] = {}

        def change(path: Path, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in made:
                made[id(value)] = self._rebuilt(path, value, known)
            return made[id(value)]

        return map_leaves(named, change)

    def _rebuilt(self, path: Path, value: torch.Tensor, known: Mapping[str, int]) -> torch.Tensor:
        labels = self.labels.get(path)
        if labels is None or len(labels) != value.dim():
            labels = tuple(_guess(d, n, value, known) for d, n in enumerate(value.shape))
        shape = [GENERIC[x.name] * x.factor if isinstance(x, Scaled) else x for x in labels]
        if value.dtype == torch.bool or not value.is_floating_point():
            return torch.ones(shape, dtype=value.dtype, device=value.device)
        return torch.randn(shape, device=value.device).to(value.dtype)


def _guess(dim: int, size: int, value: torch.Tensor, known: Mapping[str, int]) -> Label:
    """Best reading of an input never seen before: first dimension batch, mask tails tokens."""
    if dim == 0 and size == known.get("batch", size):
        return Scaled("batch")
    if value.dim() == 4 and dim >= 2:
        return Scaled("tokens")
    if size == known.get("tokens") and size != 1:
        return Scaled("tokens")
    return int(size)
