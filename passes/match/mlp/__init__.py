"""Find MLP blocks in a captured graph by structure alone."""

from rewriter.passes.match.mlp.matcher import match_mlps
from rewriter.passes.match.mlp.result import MlpMatch, MlpNodes, MlpResult

__all__ = ["MlpMatch", "MlpNodes", "MlpResult", "match_mlps"]
