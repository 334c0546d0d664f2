"""Dead code around a core whose output is 0 whatever it gets.

Its operands are zeros of the right shape that take no memory, so what made them has no user any
more and is eliminated. The output projection maps one zero token, which gives 0 or the bias, and
that is broadcast.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from rewriter.ir.site import HeadGroups
from rewriter.passes.match.result import CoreNodes, Match
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import op

_LAYOUT = frozenset(
    {"view", "reshape", "_unsafe_view", "transpose", "permute", "flatten", "contiguous", "clone"}
)


def spares_operands(silent: bool, core: CoreNodes) -> bool:
    """Whether a core needs no operands: it is silent, and sizes can be read elsewhere."""
    if not silent or core.hidden is None:
        return False
    operands = (core.query, core.key, core.value, core.output)
    return not any("window" in dim for operand in operands for dim in operand.layout.dims)


def zeros(graph: Graph, hidden: Node, heads: HeadGroups) -> list[Node]:
    """Query, key and value of zeros for a `hidden` of shape (B, n, Dm): one number each."""
    batch, tokens = (graph.call_method("size", (hidden, dim)) for dim in (0, 1))
    zero = graph.call_method("new_zeros", (hidden, ()))
    return [
        graph.call_method("expand", (zero, batch, count, tokens, width))
        for count, width in (
            (heads.query, heads.key_dim),
            (heads.key_value, heads.key_dim),
            (heads.key_value, heads.value_dim),
        )
    ]


def outputs_of_zeros(match: Match) -> dict[Node, str]:
    """Nodes that hold the output of a silent core alone, with the path of the output projection."""
    projection = (match.site.projections or {}).get("output")
    if projection is None:
        return {}
    known = [match.nodes.output.node]
    for node in known:
        for user in node.users:
            read = [n for n in user.all_input_nodes if _rank(n)]
            if read == [node] and (op(user) in _LAYOUT or is_noop(user)):
                known.append(user)
    return {node: projection.module for node in known if _rank(node) > 1}


def of_zeros(graph: Graph, module: str, x: Node, source: Node) -> Node:
    """`module(x)` of a linear layer where x, captured as `source`, holds zeros."""
    sizes = [graph.call_method("size", (x, dim)) for dim in range(_rank(source))]
    token = graph.call_method("new_zeros", (x, (1, sizes[-1])))
    made = graph.call_module(module, (token,), {})
    # a copy, since what follows may write to it
    return graph.call_method("contiguous", (graph.call_method("expand", (made, *sizes[:-1], -1)),))


def _rank(node: Node) -> int:
    found = node.meta.get("val")
    return found.dim() if isinstance(found, torch.Tensor) else 0
