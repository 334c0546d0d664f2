"""Replace attention cores inside a graph by one operator each: for code that owns no module."""

from rewriter.passes.splice.linears import splice_linears
from rewriter.passes.splice.recipe import Recipe
from rewriter.passes.splice.splice import Outcome, Spliced, splice

__all__ = ["Outcome", "Recipe", "Spliced", "splice", "splice_linears"]
