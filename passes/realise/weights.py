"""Where the attention weights of a core go, and what of it holds a number for each pair."""

from __future__ import annotations

from torch.fx import Node

from rewriter.passes.match.result import CoreNodes


def ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def weight_nodes(core: CoreNodes) -> set[Node]:
    """The attention weights inside the core, before and after casts and dropout."""
    if core.weights is None:
        return set()
    seen = {core.weights.node}
    stack = [core.weights.node]
    while stack:
        for user in stack.pop().users:
            if user in core.region and user is not core.output.node and user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def scores(core: CoreNodes) -> set[Node]:
    """Nodes inside the core that hold a number for each pair of a query and a key."""
    weights = weight_nodes(core)
    return {
        n
        for n in core.region - {core.output.node}
        if n not in weights and {core.query.node, core.key.node} <= ancestors(n)
    }


def downstream(weights: set[Node], core: CoreNodes) -> set[Node]:
    """The attention weights and the nodes outside the core that depend on them."""
    seen = set(weights)
    stack = list(weights)
    while stack:
        for user in stack.pop().users:
            if user not in seen and user not in core.region and user.op != "output":
                seen.add(user)
                stack.append(user)
    return seen
