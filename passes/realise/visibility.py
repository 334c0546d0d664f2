"""Making sure that a re-emitted module is really called.

Some containers bypass their children on a fused path (in evaluation without gradients) and would
silently ignore a rewrite. A hook on the child keeps them from doing so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rewriter.errors import VerificationError
from rewriter.mixers.placed import mixers_of
from rewriter.passes.examples import Call


class UncalledError(VerificationError):
    """Modules whose new cores never run."""

    def __init__(self, silent: Sequence[str]) -> None:
        super().__init__(
            f"the new core of '{silent[0]}' never runs: its container bypasses it, or the model "
            "always passes a cache whose calls are left to the original code"
        )
        self.silent = tuple(silent)


@contextmanager
def _counted(owner: nn.Module, counts: dict[str, int], fqn: str) -> Iterator[None]:
    """Count calls of the cores without hooks, since hooks change which path is taken."""
    cores = list(mixers_of(owner).values())

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[fqn] += 1
            return forward(*args, **kwargs)

        return count

    for core in cores:
        core.__dict__["forward"] = counting(core.forward)
    try:
        yield
    finally:
        for core in cores:
            del core.__dict__["forward"]


def core_calls(model: nn.Module, owners: Sequence[str], call: Call) -> dict[str, int]:
    """How often the cores of each owner run in one evaluation call without gradients."""
    counts = dict.fromkeys(owners, 0)
    with ExitStack() as stack:
        for fqn in owners:
            stack.enter_context(_counted(model.get_submodule(fqn), counts, fqn))
        stack.enter_context(torch.no_grad())
        model(*call.args, **dict(call.kwargs))
    return counts


def _visible(*_: Any) -> None:
    """A hook that does nothing; its presence is what matters."""


def ensure_called(model: nn.Module, owners: Sequence[str], call: Call) -> None:
    """Put a hook on every owner that is bypassed, and check that each core runs.

    Raises:
        UncalledError: cores do not run even so.
    """
    for fqn, count in core_calls(model, owners, call).items():
        if count == 0:
            model.get_submodule(fqn).register_forward_pre_hook(_visible)
    silent = [fqn for fqn, n in core_calls(model, owners, call).items() if n == 0]
    if silent:
        raise UncalledError(silent)
