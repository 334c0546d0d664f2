"""What a stage is, and what the stages share. The loop is in `trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rewriter.distill.copies import rewritten_cores
from rewriter.distill.data import Rows


@dataclass(frozen=True)
class Losses:
    """Loss of one batch: the number to report, and that of each rewritten module (stage 1)."""

    total: float
    parts: Mapping[str, float]


class Stage(Protocol):
    """A stage on private copies.

    Attributes:
        name: 'layers' or 'logits'.
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

    def backward(self, rows: Rows, scale: float) -> Losses:
        """Add `scale` times the gradients of one batch to the trained parameters."""
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
