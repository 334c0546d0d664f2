"""What the MLP matcher hands on: sites (pure data) and the graph nodes they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import NearMiss


@dataclass(frozen=True)
class MlpNodes:
    """Boundary of a matched MLP.

    Attributes:
        input: what the projections are applied to; its channels lie in dimension `input_channel`.
        output: result of the down projection, bias included; channels in `output_channel`.
        region: all nodes from the input (excluded) to the output (included).
    """

    input: fx.Node
    input_channel: int
    output: fx.Node
    output_channel: int
    region: frozenset[fx.Node]


@dataclass(frozen=True)
class MlpMatch:
    site: MlpSite
    nodes: MlpNodes


@dataclass(frozen=True)
class MlpResult:
    """Every MLP found in one captured graph, in the order it runs, and what only looks like one."""

    matches: tuple[MlpMatch, ...]
    misses: tuple[NearMiss, ...]
