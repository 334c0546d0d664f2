"""What a stage is, and what the stages share. The loop is in `trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rewriter.distill.copies import rewritten_cores
from rewriter.distill.data import Rows

Ready = Callable[[int], None]
"""Called with the number of a group whose gradients are complete."""


@dataclass(frozen=True)
class Losses:
    """Loss of one batch: the number to report, and that of each rewritten module (stage 1)."""

    total: float
    parts: Mapping[str, float]


class Stage(Protocol):
    """A stage on private copies.

    Attributes:
        name: 'layers', 'logits' or 'long'.
        core: trained new parameters (float32) by their name in the student.
        rates: learning rates of `core` relative to the stage's, by name.
        body: other trained parameters, in the compute dtype unless they are new, by name.
        groups: names that train independently of each other and are clipped together.
    """

    name: str
    core: dict[str, nn.Parameter]
    rates: dict[str, float]
    body: dict[str, nn.Parameter]
    groups: list[list[str]]

    def backward(self, rows: Rows, scale: float, ready: Ready | None = None) -> Losses:
        """Add `scale` times the gradients of one batch to the trained parameters.

        Args:
            ready: given with the last batch of a step. A group that is not read again in this
                batch may be handed to it, at most once: it takes its step and loses its gradients.
        """
        ...

    def write(self, values: Mapping[str, torch.Tensor], student: nn.Module) -> None:
        """Put trained values into the student the caller holds."""
        ...


def call(model: nn.Module, rows: Rows) -> Any:
    if rows.mask is None:
        return model(input_ids=rows.ids)
    return model(input_ids=rows.ids, attention_mask=rows.mask)


@contextmanager
def dropping(student: nn.Module, chance: float) -> Iterator[None]:
    """Inside, each mixer with a branch 'window' is without it with this probability."""
    with ExitStack() as stack:
        if chance > 0:
            for core in rewritten_cores(student).values():
                if "window" in core.branches and float(torch.rand(())) < chance:
                    stack.enter_context(core.without("window"))
        yield


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """No cache is made inside the context, where the model's config decides that."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "use_cache"):
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
