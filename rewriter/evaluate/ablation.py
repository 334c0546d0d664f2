"""Branch ablation: is each branch of a mixer used at all? (contract 9)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from rewriter.mixers.base import Mixer

NOTHING = "nothing"
T = TypeVar("T")


def branches_of(model: nn.Module) -> list[str]:
    """Names of all branches of the model's mixers, in order of first appearance."""
    names: list[str] = []
    for module in model.modules():
        if isinstance(module, Mixer):
            names += [name for name in module.branches if name not in names]
    return names


@contextmanager
def without_branch(model: nn.Module, branch: str) -> Iterator[int]:
    """Switch a branch off in every mixer that has it; yields the number of such mixers.

    Raises:
        ValueError: no mixer of the model has the branch.
    """
    with ExitStack() as stack:
        count = 0
        for module in model.modules():
            if isinstance(module, Mixer) and branch in module.branches:
                stack.enter_context(module.without(branch))
                count += 1
        if count == 0:
            raise ValueError(f"no mixer of the model has a branch '{branch}'")
        yield count


def branch_ablation(
    model: nn.Module, metric: Callable[[nn.Module], T], whole: T | None = None
) -> dict[str, T]:
    """The metric with nothing switched off, then with each branch switched off model-wide.

    Args:
        whole: the metric with nothing switched off, where it is known already.
    """
    out = {NOTHING: metric(model) if whole is None else whole}
    for branch in branches_of(model):
        with without_branch(model, branch):
            out[branch] = metric(model)
    return out
