"""A quick capture for generated programs.

Symbolic shapes make a trace ten times slower. Here a program is traced with fake tensors whose
batch and token sizes are primes that occur nowhere else; afterwards every multiple of such a prime
(and a token count plus or minus a little) is read as the size that it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.passes import torch_private
from rewriter.passes.capture import Captured
from rewriter.passes.inline import flatten

_PRIMES = (101, 211, 307)
"""Stand for the batch, the tokens, and the tokens of a second input."""

_NEAR = 12


class _Shaped(torch.Tensor):
    """An empty tensor that reports a symbolic shape."""

    _sizes: tuple[Any, ...]

    @staticmethod
    def make(like: torch.Tensor, sizes: tuple[Any, ...]) -> _Shaped:
        out = torch.empty(0, dtype=like.dtype, device="meta").as_subclass(_Shaped)
        out._sizes = sizes
        return out

    @property
    def shape(self) -> Any:  # type: ignore[override]
        return self._sizes

    def dim(self) -> int:
        return len(self._sizes)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Shaped({self._sizes}, {self.dtype})"


class Tracer:
    """Traces modules; keeps its caches from one trace to the next."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._symbols = torch_private.Symbols()
        names = ("batch", "tokens", "others")
        self._primes = {p: self._symbols.new(n, p) for p, n in zip(_PRIMES, names, strict=True)}

    def capture(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> Captured:
        """The module's graph with symbolic batch and token sizes, without source lines.

        Args:
            args: tensors (batch, tokens, ...); at most two different token counts.

        Raises:
            whatever the module raises.
        """
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        names = list(tensors)

        def run(*leaves: torch.Tensor) -> Any:
            given = dict(zip(names, leaves, strict=False))
            return torch.func.functional_call(module, given, leaves[len(names) :])

        with self._mode:
            wide = tuple(torch.empty(self._widened(a, args), dtype=a.dtype) for a in args)
        traced = torch_private.trace_static(run, (*tensors.values(), *wide), self._mode)
        placeholders = list(traced.graph.find_nodes(op="placeholder"))
        constants = _lift_constants(traced, placeholders[-1])
        _Symbolic(traced, self._primes, self._symbols, placeholders[len(names) :]).rewrite()
        flatten(traced)
        return Captured(
            graph_module=traced,
            inputs={n.name: f"args.{i}" for i, n in enumerate(placeholders[len(names) :])},
            parameters={n.name: name for n, name in zip(placeholders, names, strict=False)},
            constants=constants,
            args=args,
            kwargs={},
            module=module,
        )

    def _widened(self, arg: torch.Tensor, args: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
        counts = sorted({a.shape[1] for a in args})
        return (_PRIMES[0], _PRIMES[1 + counts.index(arg.shape[1])], *arg.shape[2:])


def _lift_constants(traced: fx.GraphModule, last: fx.Node) -> dict[str, torch.Tensor]:
    """Tensors made outside of the graph become placeholders, as export has them."""
    out: dict[str, torch.Tensor] = {}
    for node in list(traced.graph.find_nodes(op="get_attr")):
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"constant_{len(out)}")
        last.meta.update(node.meta)
        out[last.name] = getattr(traced, cast(str, node.target))
        node.replace_all_uses_with(last)
        traced.graph.erase_node(node)
    return out


class _Symbolic:
    """Rewrites the sizes of one traced graph."""

    def __init__(
        self,
        traced: fx.GraphModule,
        primes: Mapping[int, sympy.Symbol],
        symbols: torch_private.Symbols,
        inputs: list[fx.Node],
    ) -> None:
        self._graph, self._primes, self._symbols = traced.graph, primes, symbols
        self._nodes: dict[sympy.Expr, fx.Node] = {}
        self._inputs = inputs
        self._first = next(n for n in self._graph.nodes if n.op not in ("placeholder", "get_attr"))

    def rewrite(self) -> None:
        for node in list(self._graph.nodes):
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(self._shaped, node.meta["val"])
        for prime, symbol in self._primes.items():
            self._size_node(prime, symbol)
        for node in list(self._graph.nodes):
            if node.op == "call_function" and node not in self._nodes.values():
                node.args = pytree.tree_map(self._argument, tuple(node.args))
                node.kwargs = pytree.tree_map(self._argument, dict(node.kwargs))

    def _shaped(self, val: Any) -> Any:
        if not isinstance(val, torch.Tensor):
            return val
        return _Shaped.make(val, tuple(self._number(s) for s in val.shape))

    def _number(self, size: int) -> Any:
        found = self._expression(size)
        return size if found is None else self._symbols.number(found, size)

    def _expression(self, number: int) -> sympy.Expr | None:
        """What an integer is in terms of the sizes; None for a constant."""
        rest, out = number, sympy.Integer(1)
        for prime, symbol in self._primes.items():
            while rest and rest % prime == 0:
                rest //= prime
                out = out * symbol
        if rest != number:
            return sympy.Integer(rest) * out
        for prime, symbol in list(self._primes.items())[1:]:
            offset = abs(number) - prime
            if abs(offset) <= _NEAR:
                return (symbol + offset) * (1 if number > 0 else -1)
        return None

    def _size_node(self, prime: int, symbol: sympy.Symbol) -> None:
        for item in self._inputs:
            for dim, size in enumerate(item.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    with self._graph.inserting_before(self._first):
                        made = self._graph.call_function(torch.ops.aten.sym_size.int, (item, dim))
                    made.meta["val"] = size
                    self._nodes[symbol] = made
                    return

    def _argument(self, item: Any) -> Any:
        if isinstance(item, bool) or not isinstance(item, int):
            return item
        found = self._expression(item)
        return item if found is None else self._computed(found, item)

    def _computed(self, expression: sympy.Expr, hint: int) -> Any:
        """A node that computes an expression over the sizes."""
        if expression.is_Integer:
            return int(expression)
        if expression in self._nodes:
            return self._nodes[expression]
        first, rest = expression.as_two_terms()
        function = operator.add if isinstance(expression, sympy.Add) else operator.mul
        if expression.is_Pow:
            first, rest, function = expression.base, expression.base, operator.mul
        operands = (self._computed(first, hint), self._computed(rest, hint))
        with self._graph.inserting_before(self._first):
            made = self._graph.call_function(function, operands)
        made.meta["val"] = self._symbols.number(expression, hint)
        self._nodes[expression] = made
        return made
