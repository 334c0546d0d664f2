"""A rewritten model's own `save_pretrained` writes a guarded checkpoint, also after loading.

The inherited one would write ordinary files, which an unaware loader turns back into softmax
attention without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rewriter.checkpoint.write import save
from rewriter.plan import Plan

PLAN = "_rewrite_plan"


def guard(model: nn.Module, plan: Plan) -> None:
    """Remember the plan, and make `save_pretrained` (if the model has one) go through `save`."""
    model.__dict__[PLAN] = plan
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = _Save(model)


def guarded_plan(model: nn.Module) -> Plan | None:
    """The plan of a model that was loaded from a rewritten checkpoint, or None."""
    plan = model.__dict__.get(PLAN)
    return plan if isinstance(plan, Plan) else None


@dataclass(frozen=True, eq=False)
class _Save:
    """The method, bound to its model; unlike a bound function it copies and pickles with it."""

    model: nn.Module

    def __call__(self, save_directory: str | Path, **_: Any) -> None:
        save(self.model, save_directory, self.model.__dict__[PLAN], overwrite=True)
