"""After a splice: drop what nobody uses any more, and let views copy where they have to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from rewriter.passes.normalise.ops import is_inplace, op

_MOVES = frozenset(
    {"transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "expand", "slice", "select"}
    | {"alias", "detach", "_unsafe_view", "flatten", "unflatten", "swapaxes", "swapdims", "t"}
)


def relax_views(starts: Iterable[fx.Node]) -> None:
    """Turn `view` into `reshape` behind new nodes, whose memory layout is not the old one's."""
    stack = list(starts)
    while stack:
        for user in stack.pop().users:
            if op(user) in ("view", "_unsafe_view"):
                user.target = torch.ops.aten.reshape.default
            if op(user) in _MOVES:
                stack.append(user)


def erase_unused(graph: fx.Graph) -> int:
    """Erase nodes whose values are not used, also writes into tensors that nobody reads again.

    Returns the number of erased nodes.
    """
    position = {node: n for n, node in enumerate(graph.nodes)}
    erased = 0
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.is_impure() and not (is_inplace(node) and _last_reader(node, position)):
            continue
        graph.erase_node(node)
        erased += 1
    return erased


def _last_reader(node: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether the memory that `node` writes is made in this graph and not read after it."""
    root = node
    while op(root) in _MOVES or is_inplace(root):
        if not isinstance(root.args[0], fx.Node):
            return False
        root = root.args[0]
    if root.op != "call_function":
        return False
    stack, seen = [root], {root}
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            if user is not node and position[user] > position[node]:
                return False
            seen.add(user)
            if op(user) in _MOVES or is_inplace(user):
                stack.append(user)
    return True
