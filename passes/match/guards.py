"""Checks on a whole walk through the scores: masks that do not stay, masks made of the scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.ir.site import AddTerm, FillTerm, Scale, ScoreStep, Softcap, TemperatureTerm
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.ops import lends, operand

_LEAST_LATE_FACTOR = 1e-2
"""A factor below this would bring a mask value of -1e4 near ordinary scores."""


def late_changes(steps: Sequence[ScoreStep], node: fx.Node) -> Refusal | None:
    """What comes after a mask must leave hidden keys hidden."""
    masked = False
    for step in steps:
        if masked and isinstance(step, Softcap):
            return Refusal("the soft-cap comes after the mask and brings hidden keys back", node)
        if masked and isinstance(step, TemperatureTerm):
            return Refusal("the masked scores are scaled by a learned factor", node)
        if masked and isinstance(step, Scale) and step.factor < _LEAST_LATE_FACTOR:
            return Refusal("the masked scores are scaled so that hidden keys come back", node)
        masked = masked or isinstance(step, AddTerm | FillTerm)
    return None


def gates(terms: Sequence[fx.Node], product: fx.Node, view: View) -> Refusal | None:
    """A mask that is computed from the scores is a gate, which no core can be given."""
    stack, seen = list(terms), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node is product:
            return Refusal("the mask or bias is computed from the scores themselves", product)
        if node not in seen and view.order[node] > view.order[product]:
            seen.add(node)
            stack.extend([operand(node)] if lends(node) else node.all_input_nodes)
    return None
