"""Prints a mask predicate as C++ for tiles that are neither empty nor full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from numpy.typing import NDArray

from rewriter.ir.lookup import Table
from rewriter.ir.predicate import Term

_LARGEST = 1 << 21  # positions up to here must not overflow 32 bits
_LIMIT = (1 << 31) - 1
_RELATIONS = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}


@dataclass(frozen=True)
class Printed:
    """A predicate as code.

    Attributes:
        code: the function `vi allowed(int h, vi i, int j, const uint8_t* const* tables)`.
        tables: the data that `tables` points to, each flat uint8.
    """

    code: str
    tables: tuple[NDArray[np.uint8], ...]


def print_predicate(term: Term) -> Printed | str:
    """C++ of a lowered predicate, or why there is none."""
    if _overflows(term):
        return "its mask predicate needs numbers beyond 32 bits"
    tables: list[Table] = []
    body = _mask(term, tables)
    code = (
        "static ALWAYS_INLINE vi allowed([[maybe_unused]] int h, [[maybe_unused]] vi i,\n"
        "                                [[maybe_unused]] int j,\n"
        "                                [[maybe_unused]] const uint8_t* const* tables) {\n"
        f"    return {body};\n}}\n"
    )
    flat = tuple(np.ascontiguousarray(t.values.reshape(-1)).view(np.uint8) for t in tables)
    return Printed(code, flat)


def _mask(term: Term, tables: list[Table]) -> str:
    """A condition as a vector mask."""
    if term.op == "table":
        return _table(term, tables)
    if "i" not in term.names and not _has_table(term):
        return f"lanes({_scalar(term)})"
    if term.op == "not":
        return f"(~{_mask(term.args[0], tables)})"
    if term.op in ("and", "or"):
        sign = " & " if term.op == "and" else " | "
        return f"({sign.join(_mask(a, tables) for a in term.args)})"
    left, right = (_number(a) for a in term.args)
    return f"(vi)({left} {_RELATIONS[term.op]} {right})"


def _scalar(term: Term) -> str:
    """A condition that is the same for all queries, as a bool."""
    if term.op in ("true", "false"):
        return term.op
    if term.op == "not":
        return f"(!{_scalar(term.args[0])})"
    if term.op in ("and", "or"):
        sign = " && " if term.op == "and" else " || "
        return f"({sign.join(_scalar(a) for a in term.args)})"
    left, right = (_number(a) for a in term.args)
    return f"({left} {_RELATIONS[term.op]} {right})"


def _number(term: Term) -> str:
    if term.op in ("var", "const"):
        return f"({term.value})" if str(term.value).startswith("-") else str(term.value)
    if term.op in ("floordiv", "mod"):
        name = "floor_div" if term.op == "floordiv" else "floor_mod"
        return f"{name}<{term.args[1].value}>({_number(term.args[0])})"
    if term.op == "abs":
        return f"absolute({_number(term.args[0])})"
    parts = [_number(a) for a in term.args]
    if term.op in ("min", "max"):
        name = "least" if term.op == "min" else "most"
        return reduce(lambda a, b: f"{name}({a}, {b})", parts)
    return f"({(' + ' if term.op == 'add' else ' * ').join(parts)})"


def _table(term: Term, tables: list[Table]) -> str:
    table = term.value
    assert isinstance(table, Table)
    if table not in tables:
        tables.append(table)
    shape = ", ".join(str(n) for n in table.shape)
    index = ", ".join(_number(a) for a in term.args)
    return f"look_up(tables[{tables.index(table)}], {{{shape}}}, {index})"


def _has_table(term: Term) -> bool:
    return term.op == "table" or any(_has_table(a) for a in term.args)


def _overflows(term: Term) -> bool:
    return any(_overflows(a) for a in term.args) or _size(term) > _LIMIT


def _size(term: Term) -> int:
    """The largest magnitude of a number; 0 for conditions."""
    if term.op == "var":
        return _LARGEST
    if term.op == "const":
        assert isinstance(term.value, int)
        return abs(int(term.value))
    if term.op in ("add", "mul", "floordiv", "mod", "abs", "min", "max"):
        return _combined(term.op, [_size(a) for a in term.args])
    return 0


def _combined(op: str, sizes: Sequence[int]) -> int:
    if op == "add":
        return sum(sizes)
    if op == "mul":
        return prod(sizes)
    return sizes[1] if op == "mod" else sizes[0] if op == "floordiv" else max(sizes)
