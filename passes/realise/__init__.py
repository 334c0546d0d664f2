"""Realisation: re-emission of the modules that own the planned sites."""

from rewriter.passes.realise.apply import Caches, Target, apply_plan, realise, targets_of
from rewriter.passes.realise.clone import share_parameters
from rewriter.passes.realise.owner import ReEmitted

__all__ = [
    "Caches",
    "ReEmitted",
    "Target",
    "apply_plan",
    "realise",
    "share_parameters",
    "targets_of",
]
