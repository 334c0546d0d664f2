"""A structural copy of a model: new module objects, the same Parameter objects."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def share_parameters(model: M) -> M:
    """Copy the module tree; parameters are shared with `model`, buffers and config are copied.

    Shared parameters keep memory at one set of weights; buffers are copied since modules write to
    them. The original object is not changed.
    """
    memo: dict[int, object] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)
