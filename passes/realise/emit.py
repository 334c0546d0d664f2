"""Emission: an owner's captured graph becomes Python again, each core as `self.core(...)`.

Everything around the core is kept node for node. Leaf children are called as modules again, so
that a child replaced later (a LoRA layer, a quantised linear) is honoured; parameters are read
from the module; sizes are read from the data input of the call, since export may have taken them
from a mask that is absent later; `view` after the core is `reshape`, since another core may return
another memory layout. A rotary embedding becomes one call (`rotary.py`). The projections of a core
that gives 0 are left out (`silent.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Graph, Node

from rewriter.backends.ops.rotary import rotary
from rewriter.passes.capture import Captured
from rewriter.passes.match.result import Axis, CoreNodes, Layout, Match, Operand
from rewriter.passes.normalise.ops import is_inplace
from rewriter.passes.realise.children import ChildCall, child_calls
from rewriter.passes.realise.layouts import CANONICAL, CANONICAL_KV, from_canonical, to_canonical
from rewriter.passes.realise.rotary import Rotation, rotations
from rewriter.passes.realise.silent import of_zeros, outputs_of_zeros, spares_operands, zeros
from rewriter.passes.realise.weights import ancestors, downstream, scores, weight_nodes

RULE = "attention_core"


class EmissionError(Exception):
    """The owner cannot be re-emitted; caught inside the pass and turned into a refusal."""


@dataclass(frozen=True)
class Emission:
    """Generated code of an owner for one call pattern.

    Attributes:
        function: function(self, *tensors, cache, *constants) that returns the flat outputs.
        source: its Python source, for people.
        tensors: placeholder names in argument order.
        constants: tensors that the capture lifted out of the code.
        parameters: fully qualified names (relative to the owner) that the code reads.
        unaccounted: names that the original graph reads and the new code does not (contract 1).
        dropped: outputs that became None, with the reason (contract 1).
    """

    function: Callable[..., Any]
    source: str
    tensors: tuple[str, ...]
    constants: tuple[torch.Tensor, ...]
    parameters: frozenset[str]
    unaccounted: frozenset[str]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Replaced:
    """A core of an owner that a mixer takes the place of.

    Attributes:
        name: path of the mixer in the owner.
        match: the core, found in the owner alone.
        weights: the mixer returns attention weights too (only the exact one does).
        terms: how many mask and bias tensors the site has; those absent in this call are None.
        places: where the tensors of this call stand among them.
        silent: the mixer gives 0 whatever it gets, so what makes its operands need not run.
    """

    name: str
    match: Match
    weights: bool
    terms: int
    places: tuple[int, ...]
    silent: bool = False

    @property
    def nodes(self) -> CoreNodes:
        return self.match.nodes


def emit(captured: Captured, cores: Sequence[Replaced]) -> Emission:
    """Generate the code of one owner with these of its cores replaced.

    Raises:
        EmissionError: the graph around a core needs something the new core does not give.
    """
    return _Emitter(captured, cores).build()


class _Emitter:
    def __init__(self, captured: Captured, cores: Sequence[Replaced]):
        self.captured = captured
        self.cores = {core.nodes.output.node: core for core in cores}
        self.region = frozenset(node for core in cores for node in core.nodes.region)
        self.graph = Graph()
        self.new: dict[Node, Any] = {}
        self.attributes: dict[str, Node] = {}
        self.sizes: dict[Any, Node] = {}
        self.dropped: list[str] = []
        self.without_weights: set[Node] = set()
        self.rotations: dict[Node, Rotation] = {}
        self.quiet: dict[Node, str] = {}
        self.spared: set[int] = set()

    def build(self) -> Emission:
        nodes = list(self.captured.graph_module.graph.nodes)
        tensors = [n for n in nodes if n.op == "placeholder" and n.name in self.captured.inputs]
        for node in tensors:
            self.new[node] = self.graph.placeholder(node.name)
        cache = self.graph.placeholder("cache")
        lifted = [n for n in nodes if n.op == "placeholder" and n.name in self.captured.constants]
        for node in lifted:
            self.new[node] = self.graph.placeholder(node.name)
        self._root_sizes(tensors)
        children = child_calls(self.captured, self.region)
        self.rotations = rotations(n for n in nodes if n not in children)
        silent = [c.match for c in self.cores.values() if spares_operands(c.silent, c.nodes)]
        self.quiet = {n: m for match in silent for n, m in outputs_of_zeros(match).items()}
        self.spared = {id(match) for match in silent}
        for core in self.cores.values():
            if not core.weights:
                inside = weight_nodes(core.nodes) | scores(core.nodes)
                self.without_weights |= downstream(inside, core.nodes)
        for node in nodes:
            self._emit(node, children, cache)
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        self.graph.lint()
        names = tuple(n.name for n in tensors)
        code = self.graph.python_code("self")
        scope: dict[str, Any] = {**code.globals}
        exec(compile(code.src, "<re-emitted module>", "exec"), scope)
        used = frozenset(str(n.target) for n in self.graph.nodes if n.op == "get_attr")
        for n in self.graph.nodes:
            if n.op == "call_module":
                used |= {
                    name
                    for name in self.captured.parameters.values()
                    if name.startswith(f"{n.target}.")
                }
        read = frozenset(
            self.captured.parameters[n.name]
            for n in nodes
            if n.op == "placeholder" and n.name in self.captured.parameters and n.users
        )
        constants = tuple(self.captured.constants[n.name] for n in lifted)
        lost = read - used - self._spared_parameters()
        return Emission(
            scope["forward"], code.src, names, constants, used, lost, tuple(self.dropped)
        )

    def _spared_parameters(self) -> set[str]:
        """Names of what only the operands of silent cores are made of."""
        nodes = set[Node]()
        for core in self.cores.values():
            if id(core.match) in self.spared:
                for operand in (core.nodes.query, core.nodes.key, core.nodes.value):
                    nodes |= {operand.node} | ancestors(operand.node)
        known = self.captured.parameters
        return {known[n.name] for n in nodes if n.op == "placeholder" and n.name in known}

    def _root_sizes(self, tensors: Sequence[Node]) -> None:
        """Map each symbolic size to `x.size(d)` of a data input on the path of a query."""
        upstream = set[Node]().union(*(ancestors(c.nodes.query.node) for c in self.cores.values()))
        ordered = sorted(tensors, key=lambda n: (n not in upstream, -_rank(n)))
        for node in ordered:
            if node not in upstream:
                continue
            for dim, size in enumerate(_value(node).shape):
                expr = _symbol(size)
                if expr is not None and expr not in self.sizes:
                    self.sizes[expr] = self.graph.call_method("size", (self.new[node], dim))

    def _emit(self, node: Node, children: Mapping[Node, ChildCall], cache: Node) -> None:
        if node.op == "placeholder":
            return
        if node.op == "output":
            results = node.args[0]
            assert isinstance(results, tuple | list)
            self.graph.output(tuple(self._output(a) for a in results))
            return
        if node in self.cores:
            self._emit_core(self.cores[node], cache)
            return
        if node in self.region or node in self.without_weights or _is_check(node):
            return
        child = children.get(node)
        if child is not None:
            if node is child.output and child.module == self.quiet.get(child.input):
                x = self._arg(child.input)
                self.new[node] = of_zeros(self.graph, child.module, x, child.input)
            elif node is child.output:
                self.new[node] = self.graph.call_module(child.module, (self._arg(child.input),), {})
            return
        symbol = _symbol(node.meta.get("val"))
        if symbol is not None and symbol in self.sizes:
            self.new[node] = self.sizes[symbol]
            return
        if node in self.rotations:
            found = self.rotations[node]
            operands = (self._arg(n) for n in (found.x, found.cos, found.sin))
            self.new[node] = self.graph.call_function(rotary, tuple(operands))
            return
        copied = self.graph.node_copy(node, self._arg)
        copied.meta = {}
        if node.target is torch.ops.aten.view.default:
            copied.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.sym_size.int:
            copied.op, copied.target = "call_method", "size"
        self.new[node] = copied

    def _emit_core(self, replaced: Replaced, cache: Node) -> None:
        core, site = replaced.nodes, replaced.match.site
        tokens = self._size_of("token", core.query)
        windows = self._size_of("window", core.query, core.output, *core.terms)
        operands: list[Any] = []
        if id(replaced.match) in self.spared:
            operands = zeros(self.graph, self._arg(core.hidden), site.heads)
            self.dropped.append(f"the projections of '{replaced.name}': its output is 0")
        for operand, order, channels in (
            ()
            if operands
            else (
                (core.query, CANONICAL, site.heads.key_dim),
                (core.key, CANONICAL_KV, site.heads.key_dim),
                (core.value, CANONICAL_KV, site.heads.value_dim),
            )
        ):
            source = self._arg(operand.node)
            operands.append(
                to_canonical(
                    *(self.graph, source, operand.layout, order, site.heads, channels, tokens),
                    windows,
                )
            )
        terms: list[Any] = [None] * replaced.terms
        for place, term in zip(replaced.places, core.terms, strict=True):
            value = self._arg(term.node)
            if any("window" in dim for dim in term.layout.dims):
                terms[place] = self._of_windows(value, term.layout, operands[0], windows)
                continue
            folded = any(len(dim) > 1 for dim in term.layout.dims)
            if folded:
                value = self.graph.call_method("unflatten", (value, 0, (-1, site.heads.query)))
            terms[place] = value
        call = self.graph.call_module(
            replaced.name,
            (*operands, tuple(terms)),
            {
                "cache": cache,
                "need_weights": core.weights is not None and replaced.weights,
                "hidden": None if core.hidden is None else self._arg(core.hidden),
            },
        )
        call.meta["rule"] = RULE
        out = self.graph.call_function(operator.getitem, (call, 0))
        self.new[core.output.node] = from_canonical(
            self.graph, out, core.output.layout, site.heads, windows
        )
        if core.weights is not None and replaced.weights:
            weights = self.graph.call_function(operator.getitem, (call, 1))
            if any(len(dim) > 1 for dim in core.weights.layout.dims):
                weights = self.graph.call_method("flatten", (weights, 0, 1))
            for node in weight_nodes(core):
                self.new[node] = weights

    def _size_of(self, axis: Axis, *operands: Operand) -> Any:
        """Size of an axis that is a dimension of its own, or -1."""
        for operand in operands:
            for dim, axes in enumerate(operand.layout.dims):
                if axes == (axis,):
                    size: Any = _value(operand.node).shape[dim]
                    symbol = _symbol(size)
                    if symbol in self.sizes or not isinstance(size, torch.SymInt):
                        return self.sizes.get(symbol, size)
                    if operand.node in self.new:
                        return self.graph.call_method("size", (self._arg(operand.node), dim))
        return -1

    def _of_windows(self, term: Node, layout: Layout, query: Node, windows: Any) -> Node:
        """A term of each window, (..., W, ...), as one of each row of the canonical batch.

        Raises:
            EmissionError: windows share a dimension of the term with something else.
        """
        if any(len(dim) > 1 for dim in layout.dims):
            raise EmissionError("a mask of windows has them in one dimension with other axes")
        axes = [dim[0] if dim else None for dim in layout.dims]
        tokens = [len(axes) - 2, len(axes) - 1]  # as the scores have them, of size 1 or not
        if any(axes[d] not in (None, "token") for d in tokens):
            raise EmissionError("a mask of windows has its queries and keys not in the last place")
        wanted = [d for a in ("batch", "window", "head") for d in range(len(axes)) if axes[d] == a]
        spare = [d for d, axis in enumerate(axes) if axis is None and d not in tokens]
        term = self.graph.call_method("permute", (term, (*spare, *wanted, *tokens)))
        term = self.graph.call_method("flatten", (term, 0, len(spare))) if spare else term
        if "batch" in axes:
            term = self.graph.call_method("flatten", (term, 0, 1))
        if "head" not in axes:
            term = self.graph.call_method("unsqueeze", (term, 1))
        if "batch" in axes:
            return term
        rows = self.graph.call_method("size", (query, 0))
        times = self.graph.call_function(operator.floordiv, (rows, windows))
        return self.graph.call_method("repeat", (term, times, 1, 1, 1))

    def _output(self, arg: Any) -> Any:
        if isinstance(arg, Node) and arg in self.without_weights:
            self.dropped.append(
                f"output '{arg.name}' (attention weights): the new core does not form them"
            )
            return None
        return self._arg(arg)

    def _arg(self, arg: Any) -> Any:
        if not isinstance(arg, Node):
            return fx.map_arg(arg, self._arg)
        if arg in self.new:
            return self.new[arg]
        if arg.op == "placeholder" and arg.name in self.captured.parameters:
            name = self.captured.parameters[arg.name]
            if name not in self.attributes:
                # torch.fx checks attributes against an owning module, which does not exist here.
                self.attributes[name] = self.graph.create_node("get_attr", name)
            self.new[arg] = self.attributes[name]
            return self.new[arg]
        if arg in self.without_weights:
            raise EmissionError(
                f"the graph computes on the attention weights after the core (node '{arg.name}')"
            )
        return self._again(arg)

    def _again(self, node: Node) -> Any:
        """A node of a core that something outside uses too, such as the scores, computed there.

        Raises:
            EmissionError: it is computed by writing to a tensor, which may be one of the core's.
        """
        if node not in self.region or is_inplace(node):
            raise EmissionError(f"node '{node.name}' is used outside the core but belongs to it")
        copied = self.graph.node_copy(node, self._arg)
        copied.meta = {}
        if node.target is torch.ops.aten.view.default:
            copied.target = torch.ops.aten.reshape.default
        self.new[node] = copied
        return copied


def _has_effect(node: Node) -> bool:
    """Nodes that dead-code elimination must keep: the core (it fills a cache) and writes."""
    schema = getattr(node.target, "_schema", None)
    writes = schema is not None and schema.is_mutable
    return node.op in ("placeholder", "output") or writes or node.meta.get("rule") == RULE


def _is_check(node: Node) -> bool:
    name = str(node.target)
    return node.op == "call_module" or "_assert" in name or "sym_constrain" in name


def _value(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _rank(node: Node) -> int:
    return _value(node).dim()


def _symbol(value: Any) -> Any:
    """The sympy symbol of a symbolic size, or None for anything else."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return expr if expr.is_Symbol else None
    return None
