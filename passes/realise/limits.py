"""The sizes for which a trace of a module holds.

Code may ask for a size as a number, or branch on it: then what was traced at one length is another
function at a further one. Export says so by a fixed size or by the range of a symbol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from rewriter.passes.capture import Captured
from rewriter.passes.realise.calls import Path
from rewriter.passes.torch_private import size_hint, symbolic_expression

_REMEMBERED = 256


@dataclass(frozen=True)
class Limits:
    """The sizes that a trace is right for.

    Attributes:
        shapes: of each tensor of the call the size of each dimension, None if it is a symbol.
        symbols: where each size symbol is read (path, dimension), and its size in the trace.
        guards: relations of the symbols that must hold.
    """

    shapes: Mapping[Path, tuple[int | None, ...]]
    symbols: Mapping[sympy.Symbol, tuple[Path, int, int]]
    guards: Sequence[sympy.Basic]
    _known: dict[tuple[int, ...], bool] = field(default_factory=dict, compare=False)

    def fit(self, tensors: Mapping[Path, torch.Tensor], cached: bool = False) -> bool:
        """Whether the trace holds for tensors of these sizes.

        Export fixes sizes of 1, so it never traces one; one row or token runs as several do.

        Args:
            cached: behind a cache, where there are fewer queries than keys. No trace was made like
                that; only what served all rows must not be there for each of them now.
        """
        if cached:
            shared = (p for p, shape in self.shapes.items() if shape and shape[0] == 1)
            return all(tensors[path].shape[0] == 1 for path in shared)
        for path, shape in self.shapes.items():
            sizes = tensors[path].shape
            if len(sizes) != len(shape):
                return False
            if any(n is not None and n != size for n, size in zip(shape, sizes, strict=True)):
                return False
        if not self.guards:
            return True
        now = [(tensors[path].shape[dim], hint) for path, dim, hint in self.symbols.values()]
        values = tuple(int(size) if size > 1 else hint for size, hint in now)
        if values not in self._known:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            named = dict(zip(self.symbols, values, strict=True))
            self._known[values] = all(guard.subs(named) != sympy.false for guard in self.guards)
        return self._known[values]


def limits_of(captured: Captured, paths: Mapping[str, Path]) -> Limits:
    """The limits of a captured module.

    Args:
        paths: of the tensors of the call, by their dotted text.
    """
    shapes: dict[Path, tuple[int | None, ...]] = {}
    symbols: dict[sympy.Symbol, tuple[Path, int, int]] = {}
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if node.name not in captured.inputs or not isinstance(val, torch.Tensor):
            continue
        path = paths[input_path(captured.inputs[node.name])]
        sizes = [symbolic_expression(size) for size in val.shape]
        shapes[path] = tuple(int(size) if size.is_number else None for size in sizes)
        for dim, symbol in enumerate(sizes):
            hint = size_hint(val.shape[dim])
            if symbol.is_Symbol and hint is not None:
                symbols.setdefault(symbol, (path, dim, hint))
    known = set(symbols)
    guards = [g for g in captured.guards if g.free_symbols and g.free_symbols <= known]
    return Limits(shapes, symbols, guards)


def input_path(path: str) -> str:
    """The capture's name of an input leaf as the dotted path of a bound argument."""
    return path.removeprefix("kwargs.")
