"""Why something that looks like an MLP is none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from rewriter.passes.match.mlp.maps import Map
from rewriter.passes.match.mlp.region import REDUCTIONS, Region, is_tensor, walk
from rewriter.passes.match.mlp.result import MlpNodes
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.linear import CONVOLUTIONS
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import op, tensor_inputs

_SIZES = frozenset({"pow", "square", "abs", "mul"})


def looks_like(region: Region, view: View) -> Refusal | None:
    """A refusal if the region has the makings of an MLP but for one operator; None otherwise.

    A norm or a plain sum before a projection is everywhere and says nothing. What counts is an
    activation of projected values, with something in between that a pointwise rule cannot pass.
    """
    for node in region.foreign:
        if op(node) in REDUCTIONS | CONVOLUTIONS:
            inner = walk(_normed(tensor_inputs(node)[0]), view)
            only_maps = bool(inner.maps) and not inner.foreign
            if only_maps and (inner.curved or (region.curved and op(node) in CONVOLUTIONS)):
                return Refusal(f"'{op(node)}' stands between the projections", node)
    if any(op(node) in REDUCTIONS | CONVOLUTIONS for node in region.foreign):
        return None
    if region.curved and region.maps and region.foreign:
        other = region.foreign[-1]
        where = next((u for u in other.users if u in region.nodes), other)
        return Refusal(f"a projected value is combined with '{other.name}', which is none", where)
    return None


def _normed(node: fx.Node) -> fx.Node:
    """What a norm written by hand is taken of: behind the square in its mean."""
    while op(node) in _SIZES or is_noop(node) or is_cast(node):
        node = tensor_inputs(node)[0]
    return node


def depends_on_inputs(view: View) -> frozenset[fx.Node]:
    """Nodes whose value depends on an input of the call."""
    moving: set[fx.Node] = set()
    for node in view.graph.nodes:
        if node.op == "placeholder":
            if node.name in view.captured.inputs:
                moving.add(node)
        elif any(n in moving for n in node.all_input_nodes):
            moving.add(node)
    return frozenset(moving)


def chains(pairs: Sequence[tuple[Map, Map]]) -> frozenset[fx.Node]:
    """Down projections of blocks that share a projection with another block."""
    downs = {down.node for down, _ in pairs}
    out: set[fx.Node] = set()
    for down, up in pairs:
        if up.node in downs:
            out |= {down.node, up.node}
    return frozenset(out)


def used_outside(nodes: MlpNodes) -> Refusal | None:
    """A refusal if a value inside the block is read by something outside."""
    for node in nodes.region:
        if node is nodes.output:
            continue
        for user in node.users:
            inside = user in nodes.region or not (is_tensor(user) or user.op == "output")
            if not inside:
                reason = f"the hidden value '{node.name}' is also used by '{user.name}'"
                return Refusal(reason, node)
    return None
