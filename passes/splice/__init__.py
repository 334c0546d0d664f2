"""Replace attention cores inside a graph by one operator each: for code that owns no module."""

from rewriter.passes.splice.linears import splice_linears
from rewriter.passes.splice.patterns import Applied, apply_patterns
from rewriter.passes.splice.recipe import Recipe
from rewriter.passes.splice.splice import Outcome, Spliced, splice

__all__ = [
    "Applied",
    "Outcome",
    "Recipe",
    "Spliced",
    "apply_patterns",
    "splice",
    "splice_linears",
]
