"""Capturing repeated modules once: during the export the later ones stand as one opaque node each.

`folded` replaces the forward of every module of a group. The first one runs between two marks; each
later one, if it is called with inputs of the very same symbolic kind, becomes a node whose results
look like the first one's. `unfold` then puts a copy of the first one's nodes in the place of every
such node, with its own parameters, inputs and provenance, so that the graph is the one a full
export gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rewriter.passes.provenance import MODULE_STACK, module_stack
from rewriter.passes.records import closed, opened
from rewriter.passes.torch_private import symbolic_expression


@torch.library.custom_op("attention_rewriter_folding::mark", mutates_args=())
def _mark(tensors: Sequence[torch.Tensor], what: str) -> None:
    """Nothing: the node is all that is wanted."""


@torch.library.custom_op("attention_rewriter_folding::folded", mutates_args=())
def _folded(
    tensors: Sequence[torch.Tensor], like: Sequence[torch.Tensor], path: str
) -> list[torch.Tensor]:
    return _unset(like)


@_mark.register_fake
def _no_result(tensors: Sequence[torch.Tensor], what: str) -> None:
    return None


@_folded.register_fake
def _results(
    tensors: Sequence[torch.Tensor], like: Sequence[torch.Tensor], path: str
) -> list[torch.Tensor]:
    return _unset(like)


def _unset(like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device) for x in like]


_OPERATORS = torch.ops.attention_rewriter_folding
fx.node.has_side_effect(_OPERATORS.mark.default)


@dataclass
class _Template:
    """The first call of a group: what it was called with and what it returned."""

    path: str
    structure: str
    leaves: Sequence[Any]
    results: Sequence[Any]
    spec: pytree.TreeSpec

    def serves(self, structure: str, leaves: Sequence[Any]) -> bool:
        """Whether inputs are of the same kind; sizes may have become equal since that call."""
        return structure == self.structure and list(_kinds(leaves)) == list(_kinds(self.leaves))


@dataclass
class Folding:
    """What stands folded in an export: path of each folded module -> path of its template."""

    templates: dict[str, str] = field(default_factory=dict)


@contextmanager
def folded(module: nn.Module, groups: Sequence[Sequence[str]]) -> Iterator[Folding]:
    """While inside, only the first module of each group runs; see `passes.repeats`."""
    folding = Folding()
    with ExitStack() as stack:
        for group in groups:
            known: list[_Template] = []
            for path in group:
                child = module.get_submodule(path)
                stack.enter_context(_replaced(child, path, known, folding))
        yield folding


@contextmanager
def _replaced(
    module: nn.Module, path: str, known: list[_Template], folding: Folding
) -> Iterator[None]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        template = next((t for t in known if t.serves(str(spec), leaves)), None)
        if template is not None:
            folding.templates[path] = template.path
            return _stand_in(template, path, leaves, tensors)
        _OPERATORS.mark(tensors, f"enter {path}")
        output = original(*args, **kwargs)
        results, out_spec = pytree.tree_flatten(opened(output))
        _OPERATORS.mark([x for x in results if isinstance(x, torch.Tensor)], f"leave {path}")
        known.append(_Template(path, str(spec), leaves, results, out_spec))
        return output

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _stand_in(
    template: _Template, path: str, leaves: Sequence[Any], tensors: list[torch.Tensor]
) -> Any:
    """The output of a folded call: new tensors, inputs handed on, constants."""
    passed = {id(x): n for n, x in enumerate(template.leaves) if isinstance(x, torch.Tensor)}
    like = [x for x in template.results if isinstance(x, torch.Tensor)]
    fresh = iter(_OPERATORS.folded(tensors, like, path))
    flat: list[Any] = []
    for result in template.results:
        if isinstance(result, torch.Tensor):
            new = next(fresh)
            flat.append(leaves[passed[id(result)]] if id(result) in passed else new)
        else:
            flat.append(result)
    return closed(pytree.tree_unflatten(flat, template.spec))


def _kinds(leaves: Sequence[Any]) -> Iterator[Any]:
    """What of the inputs the capture of a module depends on: everything but tensor values."""
    first: dict[int, int] = {}
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            sizes = tuple(symbolic_expression(n) for n in (*leaf.shape, *leaf.stride()))
            at = first.setdefault(id(leaf), number)
            yield (at, sizes, leaf.dtype, leaf.device, isinstance(leaf, nn.Parameter))
        elif isinstance(leaf, torch.SymInt):
            yield symbolic_expression(leaf)
        else:
            yield (type(leaf), leaf)


def unfold(
    module: fx.GraphModule, folding: Folding, parameters: Mapping[str, str]
) -> fx.GraphModule:
    """Put the template's nodes in the place of every folded node, in place; returns the module.

    Args:
        module: flat graph whose nodes carry `MODULE_STACK`.
        folding: what `folded` noted during the export.
        parameters: placeholder name -> fully qualified name of the parameter or buffer.
    """
    graph = module.graph
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    by_name = {fqn: placeholders[name] for name, fqn in parameters.items()}
    marks: dict[str, fx.Node] = {
        str(n.args[1]): n
        for n in graph.find_nodes(op="call_function", target=_OPERATORS.mark.default)
    }
    bodies = {path: _Body(path, graph, marks) for path in set(folding.templates.values())}
    for node in graph.find_nodes(op="call_function", target=_OPERATORS.folded.default):
        path = cast(str, node.args[2])
        bodies[folding.templates[path]].copy_to(node, path, by_name, parameters)
    for mark in marks.values():
        graph.erase_node(mark)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


class _Body:
    """The nodes between the marks of a template."""

    def __init__(self, path: str, graph: fx.Graph, marks: Mapping[str, fx.Node]):
        self.path = path
        enter, leave = marks[f"enter {path}"], marks[f"leave {path}"]
        self.inputs = cast("list[fx.Node]", enter.args[0])
        self.outputs = cast("list[fx.Node]", leave.args[0])
        self.nodes: list[fx.Node] = []
        node = enter.next
        while node is not leave:
            if node.target is not _OPERATORS.mark.default:
                self.nodes.append(node)
            node = node.next

    def copy_to(
        self,
        node: fx.Node,
        path: str,
        by_name: Mapping[str, fx.Node],
        parameters: Mapping[str, str],
    ) -> None:
        """Replace the folded `node` of the module at `path` by a copy of the body."""
        graph = node.graph
        env: dict[fx.Node, fx.Node] = {}

        def new(old: fx.Node) -> fx.Node:
            if old not in env:
                name = parameters.get(old.name, "") if old.op == "placeholder" else ""
                inside = name.startswith(f"{self.path}.")
                env[old] = by_name[path + name.removeprefix(self.path)] if inside else old
            return env[old]

        env.update(zip(self.inputs, cast("list[fx.Node]", node.args[0]), strict=True))
        with graph.inserting_before(node):
            for old in self.nodes:
                if isinstance(old.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
                    continue  # sizes are those of the first call: its inputs are the same ones
                env[old] = graph.node_copy(old, new)
                env[old].meta = {**old.meta, MODULE_STACK: self._stack(old, node, path)}
        for user in list(node.users):
            user.replace_all_uses_with(new(self.outputs[cast(int, user.args[1])]))
            graph.erase_node(user)
        graph.erase_node(node)

    def _stack(self, old: fx.Node, node: fx.Node, path: str) -> tuple[tuple[str, int], ...]:
        """Provenance of a copy: that of the folded `node`, then what lies inside the template."""
        inside = [
            (path + name.removeprefix(self.path), number)
            for name, number in module_stack(old)
            if name.startswith(f"{self.path}.")
        ]
        return (*module_stack(node), *inside)
