"""What exchanges share: the forward up to the first site that they change.

A model's layers lie in lists. Where an assignment differs from a known one only from some site on,
the layers before it give what they gave then, so the output of the last of them is put in their
place and none of them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.ir.site import AttentionSite

KEPT = 10  # layers whose output is kept for one probe, evenly spaced
Outputs = Mapping[int, Any]  # by number of the layer


class SharedBlocks:
    """The layers of a model around its sites.

    Attributes:
        blocks: children of lists that hold sites, in running order.
        ends: for each, the number of sites in it and before it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]):
        modules = dict(model.named_modules())
        self.blocks: list[nn.Module] = []
        self.ends: list[int] = []
        for number, site in enumerate(sites):
            block = _block(modules, site.fqn)
            if block is None:  # nothing behind it can be told apart
                break
            if self.blocks and self.blocks[-1] is block:
                self.ends[-1] = number + 1
            elif any(block is other for other in self.blocks):
                break
            else:
                self.blocks.append(block)
                self.ends.append(number + 1)
        self._every = max(1, len(self.blocks) // KEPT)

    @contextmanager
    def reused(self, before: Outputs, first: int) -> Iterator[dict[int, Any]]:
        """Inside, one forward runs only what site `first` and the ones behind it need.

        Args:
            before: what an earlier forward on the same tokens gave, which ran the same candidates
                at all sites before `first`.

        Yields:
            Outputs to keep, complete once the forward is done.
        """
        usable = [n for n in before if self.ends[n] <= first]
        last = max(usable, default=-1)
        fresh: dict[int, Any] = {n: before[n] for n in usable}
        for number, block in enumerate(self.blocks):
            if number <= last:
                block.__dict__["forward"] = _given(before[last])
            elif number % self._every == 0:
                block.__dict__["forward"] = _keeping(block.forward, fresh, number)
        try:
            yield fresh
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def _block(modules: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """The outermost child of a list that holds the module at `path`."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:count])], nn.ModuleList):
            block = modules[".".join(parts[: count + 1])]
            return None if "forward" in block.__dict__ else block
    return None


def _given(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _copy(output)


def _keeping(forward: Callable[..., Any], fresh: dict[int, Any], number: int) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        fresh[number] = _copy(output)
        return output

    return kept


def _copy(output: Any) -> Any:
    """Private, so that nobody changes it in place."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, output)
