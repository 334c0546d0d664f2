"""Write the nodes of a recipe into a graph, in front of the core they replace."""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx

import rewriter.backends.ops.block_sparse
import rewriter.backends.ops.padded  # noqa: F401  (both register the operators used below)
from rewriter.backends.ops.codec import encode
from rewriter.ir.site import AttentionSite, FillTerm
from rewriter.passes.match import Match, Operand
from rewriter.passes.match.mask import HIDDEN
from rewriter.passes.normalise.ops import value
from rewriter.passes.realise.layouts import CANONICAL, CANONICAL_KV, from_canonical, to_canonical
from rewriter.passes.splice.recipe import Recipe, mask_terms

RULE = "rewriter_rule"
"""Node metadata: the name of the rule that wrote the node."""


def emit(graph: fx.Graph, found: Match, recipe: Recipe) -> fx.Node:
    """The node that holds what the core's output node held, in its layout; nothing uses it yet."""
    site, nodes = found.site, found.nodes
    before = set(graph.nodes)
    with graph.inserting_before(nodes.output.node):
        q = _canonical(graph, nodes.query, site, "query")
        k = _canonical(graph, nodes.key, site, "key")
        v = _canonical(graph, nodes.value, site, "value")
        text = encode(recipe.spec)
        operators = torch.ops.attention_rewriter
        if recipe.padded:
            target = operators.padded_block_sparse.default
            more: tuple[fx.Node | None, ...] = (valid_keys(graph, found, v),)
        else:
            target, more = operators.block_sparse.default, (None,) * 7
        pair = graph.call_function(target, (q, k, v, *more, text, recipe.backend))
        out = graph.call_function(operator.getitem, (pair, 0))
        out = from_canonical(graph, out, nodes.output.layout, site.heads)
    for node in graph.nodes:
        if node not in before:
            node.meta[RULE] = f"splice {recipe.describe()}"
            for key in ("nn_module_stack", "stack_trace"):
                if key in nodes.output.node.meta:
                    node.meta[key] = nodes.output.node.meta[key]
    return out


def valid_keys(graph: fx.Graph, found: Match, values: fx.Node) -> fx.Node:
    """(B, N) bool, False at padded keys, read off the mask terms.

    Under the masks a recipe takes every query sees its own position, so a key is padding where the
    diagonal of the mask hides it; only these elements of the mask are computed then.
    """
    batch = graph.call_function(torch.ops.aten.sym_size.int, (values, 0))
    tokens = graph.call_function(torch.ops.aten.sym_size.int, (values, 2))
    parts: list[fx.Node] = []
    for index, term in mask_terms(found):
        allow = _allowed(graph, index, term, found.site)
        dims = list(term.layout.dims)
        while len(dims) > 3:  # the head axis, or a batch axis of size 1 before (heads, tokens)
            place = dims.index((), 0 if dims[0] == () else 1)
            allow = graph.call_method("squeeze", (allow, place))
            del dims[place]
        if dims[-2:] == [("token",), ("token",)]:
            allow = graph.call_method("diagonal", (allow, 0, -2, -1))
            del dims[-2]
        elif len(dims) >= 2 and dims[-2] == ():
            allow = graph.call_method("squeeze", (allow, -2))
            del dims[-2]
        parts.append(graph.call_method("expand", (allow, batch, tokens)))
    return functools.reduce(
        lambda a, b: graph.call_function(torch.ops.aten.logical_and.default, (a, b)), parts
    )


def _allowed(graph: fx.Graph, index: int, term: Operand, site: AttentionSite) -> fx.Node:
    """True where the term shows a key."""
    node = term.node
    fill = next((s for s in site.score if isinstance(s, FillTerm) and s.index == index), None)
    tensor = value(node)
    boolean = tensor is not None and tensor.dtype == torch.bool
    if fill is None and not boolean:
        return graph.call_function(torch.ops.aten.gt.Scalar, (node, HIDDEN))
    if not boolean:
        node = graph.call_function(torch.ops.aten.ne.Scalar, (node, 0))
    if fill is not None and not fill.keep:
        return graph.call_function(torch.ops.aten.logical_not.default, (node,))
    return node


def _canonical(graph: fx.Graph, operand: Operand, site: AttentionSite, side: str) -> fx.Node:
    order = CANONICAL if side == "query" else CANONICAL_KV
    channels = site.heads.value_dim if side == "value" else site.heads.key_dim
    node = operand.node
    tokens = None
    if any("token" in dim and len(dim) > 1 for dim in operand.layout.dims):
        raise NotImplementedError("tokens folded into another axis")
    return to_canonical(graph, node, operand.layout, order, site.heads, channels, tokens)
