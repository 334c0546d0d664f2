"""Which of two tensors leads back to the product of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from rewriter.passes.match.content import depends_on_input
from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import regroups
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import op, operand, value

_TRANSPARENT = frozenset({"mul", "div", "tanh", "add", "sub", "masked_fill", "where"})
"""Operators that the walk through the scores has a rule for."""


def leads_to_product(
    view: View, node: fx.Node, fit: Callable[[fx.Node], bool] = lambda item: True
) -> bool:
    """True if transparent nodes lead back to a product of two activations that is `fit`."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if view.is_product(item):
            if fit(item):
                return True
            continue
        if is_noop(item) or is_cast(item) or regroups(item):
            stack.append(operand(item))  # the other tensor lends its sizes or dtype
        elif op(item) in _TRANSPARENT:
            stack.extend(n for n in item.all_input_nodes if value(n) is not None)
    return False


def of_activations(view: View, node: fx.Node) -> bool:
    """True if transparent nodes lead back to a product of two tensors that both depend on the
    input: queries times a table of positions are a bias."""

    def both(item: fx.Node) -> bool:
        sides = [n for n in item.all_input_nodes if value(n) is not None]
        return all(depends_on_input(n, view) for n in sides[-2:])

    return leads_to_product(view, node, both)
