"""What all match rules share: the captured graph seen through the normal form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import fx

from rewriter.passes.capture import Captured
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.constants import Constants
from rewriter.passes.normalise.contract import is_contraction
from rewriter.passes.normalise.linear import Linear, linear
from rewriter.passes.normalise.ops import value
from rewriter.passes.normalise.sizes import Sizes


@dataclass(frozen=True)
class Refusal:
    """A rule that does not apply: why, and at which node."""

    reason: str
    node: fx.Node


@dataclass(frozen=True)
class View:
    """A captured graph with the tables that reading it needs."""

    captured: Captured

    @property
    def graph(self) -> fx.Graph:
        return self.captured.graph_module.graph

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.graph)

    @cached_property
    def constants(self) -> Constants:
        return Constants(self.captured.constants)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of each node in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @cached_property
    def output(self) -> fx.Node:
        return cast(fx.Node, next(iter(self.graph.find_nodes(op="output"))))

    def is_parameter(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node.name in self.captured.parameters

    def linear(self, node: fx.Node) -> Linear | None:
        return linear(node, self.is_parameter)

    def is_product(self, node: fx.Node) -> bool:
        """A contraction of two activations, as opposed to a projection by a parameter."""
        return is_contraction(node) and self.linear(node) is None

    def axes(self, node: fx.Node) -> tuple[Axes, Labels]:
        """A new axis table with one fresh axis per dimension of `node`."""
        axes = Axes()
        return axes, axes.fresh(self.sizes.of(node))

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        val = value(node)
        return val.dtype if val is not None else None
