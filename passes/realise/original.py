"""The original of a rewritten model, made again from it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rewriter.passes.realise.clone import share_parameters
from rewriter.passes.realise.owner import ReEmitted
from rewriter.passes.realise.subclass import InPlace

M = TypeVar("M", bound=nn.Module)


def original_of(model: M) -> M:
    """A model of the original classes with the parameters of a rewritten one, in eval mode.

    Parameters are shared. What a rewrite put into modules (cores and their parameters) is left out;
    weights that a structure replaced are not brought back.
    """
    made = share_parameters(model).eval()
    for module in list(made.modules()):
        if isinstance(module, ReEmitted):
            module._modules.pop("core", None)
        kind = type(module)
        while issubclass(kind, InPlace):
            kind = kind.__bases__[1]
        module.__class__ = kind
    return made
