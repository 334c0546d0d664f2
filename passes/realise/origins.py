"""Which mask and bias tensors of a site are there in a call that brings only some of them.

A call without a mask may still have its bias. The tensors of such a call are told apart by the
arguments they are made from, as seen in a call that has all of them.
"""

from __future__ import annotations

from torch.fx import Node

from rewriter.passes.capture import Captured
from rewriter.passes.match import Match
from rewriter.passes.realise.weights import ancestors

Origin = frozenset[str]
"""Names of the owner's arguments that a tensor is computed from; none for one of its own."""


def origins(captured: Captured, match: Match) -> tuple[Origin, ...]:
    """Of the terms of a core, in their order."""
    return tuple(_origin(captured, term.node) for term in match.nodes.terms)


def places(here: tuple[Origin, ...], whole: tuple[Origin, ...]) -> tuple[int, ...] | None:
    """Where each term stands among all of the site's; None if that cannot be told."""
    if len(here) == len(whole):
        return tuple(range(len(whole)))
    found = tuple(whole.index(origin) for origin in here if whole.count(origin) == 1)
    return found if len(found) == len(set(here)) == len(here) else None


def _origin(captured: Captured, node: Node) -> Origin:
    seen = {node, *ancestors(node)}
    return frozenset(captured.inputs[n.name] for n in seen if n.name in captured.inputs)
