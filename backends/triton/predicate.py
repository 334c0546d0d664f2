"""Mask predicates as Triton expressions, and the tables they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter.ir.lookup import Table
from rewriter.ir.predicate import Term, lower


@dataclass(frozen=True)
class Printed:
    """A predicate over int32 blocks i (rows), j (columns) and the scalar h.

    Attributes:
        text: the expression, or None where everything is visible.
        tables: what `table0`, `table1` ... in the text are.
    """

    text: str | None
    tables: tuple[Table, ...]


@lru_cache(maxsize=256)
def printed(mask: Boolean) -> Printed:
    """Source text of a predicate.

    Raises:
        ValueError: it cannot be lowered.
    """
    term = lower(mask)
    if term.op == "true":
        return Printed(None, ())
    found: list[Table] = []
    return Printed(_text(term, found), tuple(found))


_INFIX: Mapping[str, str] = {
    "add": " + ",
    "mul": " * ",
    "and": " & ",
    "or": " | ",
    "le": " <= ",
    "lt": " < ",
    "eq": " == ",
    "ne": " != ",
}


def _text(term: Term, tables: list[Table]) -> str:
    if term.op in ("var", "const"):
        return str(term.value)
    if term.op in ("true", "false"):
        return "(i == i)" if term.op == "true" else "(i != i)"
    parts = [_text(a, tables) for a in term.args]
    if term.op in _INFIX:
        return "(" + _INFIX[term.op].join(parts) + ")"
    if term.op == "not":
        return f"({parts[0]} == 0)"
    if term.op == "abs":
        return f"tl.abs({parts[0]})"
    if term.op in ("min", "max"):
        out = parts[0]
        for part in parts[1:]:
            out = f"tl.{term.op}imum({out}, {part})"
        return out
    if term.op in ("mod", "floordiv"):
        return _divided(term, *parts)
    assert isinstance(term.value, Table)
    tables.append(term.value)
    return _looked_up(f"table{len(tables) - 1}", term.value.shape, parts)


def _divided(term: Term, top: str, bottom: str) -> str:
    # `//` and `%` of a GPU round towards zero; the predicate means rounding down.
    if _never_negative(term.args[0]):
        return f"({top} {'%' if term.op == 'mod' else '//'} {bottom})"
    rest = f"(({top} % {bottom} + {bottom}) % {bottom})"
    return rest if term.op == "mod" else f"(({top} - {rest}) // {bottom})"


def _never_negative(term: Term) -> bool:
    if term.op == "const":
        return isinstance(term.value, int) and term.value >= 0
    if term.op == "mod":
        return True
    return term.op in ("var", "abs", "add", "mul", "floordiv", "min", "max") and all(
        _never_negative(a) for a in term.args
    )


def _looked_up(name: str, shape: tuple[int, ...], index: list[str]) -> str:
    flat, inside = "0", []
    for x, size in zip(index, shape, strict=True):
        inside.append(f"({x} >= 0) & ({x} < {size})")
        flat = f"({flat} * {size} + ({x}))"
    # `i * 0 + j * 0` gives the address and the mask the shape of the tile, whatever is indexed.
    within = f"{' & '.join(inside)} & (i * 0 + j * 0 == 0)"
    return f"(tl.load({name} + {flat} + i * 0 + j * 0, mask={within}, other=0) != 0)"


def table_tensors(mask: Boolean, device: torch.device) -> dict[str, Tensor]:
    """The tables as (entries,) uint8 tensors by parameter name."""
    tables = printed(mask).tables
    return {f"table{n}": _tensor(t, device) for n, t in enumerate(tables)}


@lru_cache(maxsize=64)
def _tensor(table: Table, device: torch.device) -> Tensor:
    flat = torch.tensor(table.values.reshape(-1), dtype=torch.uint8)
    # An empty table still needs an address; nothing is read from it.
    return (flat if flat.numel() else flat.new_zeros(1)).to(device)
