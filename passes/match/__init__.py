"""Find attention blocks in a captured graph by structure alone."""

from rewriter.passes.match.matcher import match
from rewriter.passes.match.result import Axis, CoreNodes, Layout, Match, MatchResult, Operand

__all__ = ["Axis", "CoreNodes", "Layout", "Match", "MatchResult", "Operand", "match"]
