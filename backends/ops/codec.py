"""Specs as text, since an operator of a graph takes no Python object. Nothing is ever evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from sympy.logic.boolalg import ITE, And, Boolean, Equivalent, Implies, Not, Or, Xor

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.lookup import Lookup, Table
from rewriter.ir.recurrence import Recurrence

Spec = Recurrence | BlockSparse | Decode
_SPECS: Mapping[str, type[Any]] = {c.__name__: c for c in (Recurrence, BlockSparse, Decode)}
_NODES: Mapping[str, Callable[..., Any]] = {
    c.__name__: c
    for c in (
        *(And, Or, Not, Xor, Implies, Equivalent, ITE, Lookup),
        *(sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne),
        *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Mod, sympy.floor, sympy.ceiling),
        *(sympy.Abs, sympy.Max, sympy.Min),
    )
}
_ALIASES = {c.__name__: n for n, c in _NODES.items() if isinstance(c, type)}


@lru_cache(maxsize=1024)
def encode(spec: Spec) -> str:
    """A spec as JSON, the same text for equal specs.

    Raises:
        ValueError: the mask holds a function that has no text form.
    """
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    if isinstance(spec, BlockSparse):
        values["mask"] = _tree(spec.mask)
    return json.dumps({"spec": type(spec).__name__, **values})


@lru_cache(maxsize=1024)
def decode(text: str) -> Spec:
    """The spec that `encode` gave as `text`."""
    values = json.loads(text)
    kind = _SPECS[values.pop("spec")]
    if "mask" in values:
        values["mask"] = _expression(values["mask"])
    spec: Spec = kind(**values)
    return spec


def _tree(node: sympy.Basic) -> Any:
    if node == sympy.true or node == sympy.false:
        return bool(node)
    if isinstance(node, sympy.Integer):
        return int(node)
    if isinstance(node, sympy.Rational):
        return ["Rational", int(node.p), int(node.q)]
    if isinstance(node, sympy.Symbol):
        return ["Symbol", node.name]
    if isinstance(node, Table):
        return ["Table", np.packbits(node.values).tobytes().hex(), *node.shape]
    name = _ALIASES.get(type(node).__name__)
    if name is None:
        raise ValueError(f"{node} in a mask predicate has no text form")
    return [name, *(_tree(a) for a in node.args)]


def _expression(tree: Any) -> Boolean:
    if isinstance(tree, bool):
        return sympy.true if tree else sympy.false
    if isinstance(tree, int):
        return sympy.Integer(tree)
    name, *args = tree
    if name == "Symbol":
        return sympy.Symbol(args[0], integer=True, nonnegative=True)
    if name == "Rational":
        return sympy.Rational(*args)
    if name == "Table":
        packed = np.frombuffer(bytes.fromhex(args[0]), dtype=np.uint8)
        return Table(np.unpackbits(packed, count=math.prod(args[1:])).tobytes(), tuple(args[1:]))
    return _NODES[name](*(_expression(a) for a in args))
