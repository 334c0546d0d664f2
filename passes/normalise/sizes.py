"""Symbolic sizes as plain integers: each symbol becomes its own large prime.

Products and quotients of sizes then factor uniquely, so a reshape can be read off by arithmetic:
no static size of a model shares a factor with a batch or sequence symbol.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import sympy
import torch
from torch import fx

from rewriter.passes.normalise.ops import op, value
from rewriter.passes.torch_private import symbolic_expression

_FIRST = 1_000_003
_SMALL = 1_000
"""A formula that comes out smaller, such as a remainder, may be any other size as well."""


def _told(graph: fx.Graph) -> Iterator[tuple[sympy.Expr, int]]:
    """Symbolic sizes that a view asks for as a number: tracing knows less than the model says."""
    for node in graph.nodes:
        val, asked = value(node), node.args[1] if len(node.args) > 1 else None
        if op(node) not in ("view", "reshape") or val is None or not isinstance(asked, list):
            continue  # a view may also ask for a dtype
        for wanted, size in zip(asked, val.shape, strict=True):
            expression = symbolic_expression(size)
            if isinstance(wanted, int) and wanted >= 0 and expression.free_symbols:
                yield expression, wanted


class Sizes:
    """Integer stand-ins for the sizes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        symbols: set[sympy.Symbol] = set()
        for node in graph.nodes:
            if (val := value(node)) is not None:
                for size in val.shape:
                    symbols |= symbolic_expression(size).free_symbols
        self.primes: dict[sympy.Symbol, int] = {}
        self._numbers: dict[sympy.Expr, int] = {}
        self._moving: set[int] = set()
        prime = _FIRST
        for symbol in sorted(symbols, key=str):
            prime = int(sympy.nextprime(prime))
            self.primes[symbol] = prime
        for expression, literal in _told(graph):
            self._identify(expression, literal)

    def _identify(self, expression: sympy.Expr, literal: int) -> None:
        """Give two symbols one stand-in where the graph says so: 16 * s // t is called 16."""
        for one, other in combinations(sorted(expression.free_symbols, key=str), 2):
            same = {**self.primes, one: self.primes[other]}
            if int(expression.subs(self.primes)) != literal == int(expression.subs(same)):
                self.primes[one] = self.primes[other]

    def number(self, size: int | torch.SymInt) -> int:
        """Stand-in of one size."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = symbolic_expression(size)
        if expression not in self._numbers:
            number = self._numbers[expression] = int(expression.subs(self.primes))
            if expression.free_symbols and number > _SMALL:
                self._moving.add(number)
        return self._numbers[expression]

    def of(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a tensor node in stand-ins."""
        val = value(node)
        if val is None:
            raise TypeError(f"'{node.name}' holds no tensor")
        return tuple(self.number(s) for s in val.shape)

    def dynamic(self, number: int) -> bool:
        """True if a stand-in contains a symbol, rounded quotients of one included."""
        rounded = number in self._moving
        return rounded or any(number % prime == 0 for prime in self.primes.values())

    def static_factor(self, number: int) -> int:
        """The stand-in without its symbols: 4 for 4 * batch."""
        for prime in self.primes.values():
            while number % prime == 0:
                number //= prime
        return number
