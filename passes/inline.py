"""Flatten nested regions (no_grad, autocast) so that matching and emission see one graph."""

from __future__ import annotations

import operator
from typing import cast

from torch import fx

from rewriter.passes.torch_private import is_assert, region_of

NO_GRAD = "no_grad"
"""Node metadata: the node stood in a region that runs without gradients."""


def flatten(module: fx.GraphModule) -> fx.GraphModule:
    """Inline every nested region of `module` and erase asserts, in place; returns it."""
    while any(_inline(module, node) for node in list(module.graph.nodes)):
        pass
    for node in reversed(module.graph.nodes):
        if is_assert(node) and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _inline(module: fx.GraphModule, node: fx.Node) -> bool:
    region = region_of(node)
    if region is None:
        return False
    body, operands, no_grad = region
    inner = cast(fx.GraphModule, module.get_submodule(cast(str, body.target)))
    inner = flatten(inner)
    env: dict[fx.Node, fx.Node] = {}
    sources = iter(operands)
    result: object = None
    with module.graph.inserting_before(node):
        for item in inner.graph.nodes:
            if item.op == "placeholder":
                env[item] = next(sources)
            elif item.op == "output":
                result = fx.node.map_arg(item.args[0], env.__getitem__)
            else:
                env[item] = module.graph.node_copy(item, env.__getitem__)
                if no_grad:
                    env[item].meta[NO_GRAD] = True
    _replace(module.graph, node, result)
    if not body.users:
        module.graph.erase_node(body)
    return True


def _replace(graph: fx.Graph, node: fx.Node, result: object) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        values = cast("tuple[fx.Node, ...]", result)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise ValueError(f"region result '{node.name}' is used as a whole")
            user.replace_all_uses_with(values[cast(int, user.args[1])])
            graph.erase_node(user)
    graph.erase_node(node)
