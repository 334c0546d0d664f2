"""Conditions over (h, i, j) in a small normal form, and their values on tensors.

`lower` turns a sympy predicate into `Term`s: integer variables, +, *, floor division and modulus by
positive constants, |x|, min, max, comparisons, and/or/not and table lookups. Everything that reads
predicates (the evaluation here, block schedules, code generators) reads this form. It covers the
mask table of the catalogue: sparse.md section 1.1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import combinations
from typing import Any, Literal

import sympy
import torch
from sympy.logic.boolalg import (
    ITE,
    And,
    Boolean,
    BooleanFalse,
    BooleanTrue,
    Equivalent,
    Implies,
    Not,
    Or,
    Xor,
)

from rewriter.ir.lookup import Lookup, Table

B, H, I, J = sympy.symbols("b h i j", integer=True, nonnegative=True)  # noqa: E741 (query position)
VALID, FIRST = sympy.Function("valid"), sympy.Function("first")
DOCUMENT, GROUP = sympy.Function("document"), sympy.Function("group")

Number = Literal["var", "const", "add", "mul", "floordiv", "mod", "abs", "min", "max"]
Logic = Literal["true", "false", "and", "or", "not", "le", "lt", "eq", "ne", "table"]


@dataclass(frozen=True)
class Term:
    """One node.

    Attributes:
        op: 'var' (value: 'h', 'i' or 'j'), 'const' (value: int), 'add', 'mul', 'floordiv' and
            'mod' (second argument a positive const, rounding down), 'abs', 'min', 'max'; and for
            conditions 'true', 'false', 'and', 'or', 'not', 'le', 'lt', 'eq', 'ne', 'table' (value:
            `Table`, arguments: its indices; false outside).
        args: operands.
        value: of a leaf or a table.
    """

    op: Number | Logic
    args: tuple[Term, ...] = ()
    value: int | str | Table | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        """Variables that occur: a subset of {'h', 'i', 'j'}."""
        if self.op == "var":
            return frozenset({str(self.value)})
        return frozenset().union(*(a.names for a in self.args))

    @cached_property
    def apart(self) -> bool:
        """Whether no two operands share a position, so that their values vary independently."""
        return not any(a.names & b.names - {"h"} for a, b in combinations(self.args, 2))


@lru_cache(maxsize=512)
def lower(predicate: Boolean) -> Term:
    """The normal form of a predicate.

    Raises:
        ValueError: it contains something else than the operations of `Term`, or depends on the
            batch row.
    """
    if predicate.has(VALID) or B in predicate.free_symbols:
        raise ValueError(
            f"the mask predicate {predicate} depends on the batch row; give kernels key_lengths, "
            "cu_seqlens or a bias instead"
        )
    return _condition(predicate)


_RELATIONS: Mapping[Any, tuple[Logic, bool]] = {
    sympy.Le: ("le", False),
    sympy.Lt: ("lt", False),
    sympy.Ge: ("le", True),
    sympy.Gt: ("lt", True),
    sympy.Eq: ("eq", False),
    sympy.Ne: ("ne", False),
}


def _condition(p: Any) -> Term:
    if isinstance(p, BooleanTrue):
        return Term("true")
    if isinstance(p, BooleanFalse):
        return Term("false")
    if isinstance(p, And | Or):
        return Term("and" if isinstance(p, And) else "or", tuple(_condition(a) for a in p.args))
    if isinstance(p, Not):
        return Term("not", (_condition(p.args[0]),))
    if isinstance(p, Lookup):
        return Term("table", tuple(_number(a) for a in p.args[1:]), p.args[0])
    if type(p) in _RELATIONS:
        op, swap = _RELATIONS[type(p)]
        if not isinstance(p.args[0], sympy.Expr):  # conditions compared with each other
            same = sympy.Equivalent(*p.args)
            return _condition(same if op == "eq" else Not(same))
        left, right = _whole(p.args[0], p.args[1])
        return Term(op, (right, left) if swap else (left, right))
    if isinstance(p, Xor | Equivalent | Implies | ITE):
        return _connective(p, tuple(_condition(a) for a in p.args))
    raise ValueError(f"cannot evaluate the mask predicate {p}")


def _connective(p: Any, parts: tuple[Term, ...]) -> Term:
    """Exclusive or, equivalence, implication and choice, by and, or and not."""
    inverse = tuple(Term("not", (x,)) for x in parts)
    if isinstance(p, Implies):
        return Term("or", (inverse[0], parts[1]))
    if isinstance(p, ITE):
        chosen = Term("and", (parts[0], parts[1]))
        return Term("or", (chosen, Term("and", (inverse[0], parts[2]))))
    if isinstance(p, Equivalent):
        return Term("or", (Term("and", parts), Term("and", inverse)))
    return reduce(_differ, parts)


def _differ(a: Term, b: Term) -> Term:
    return Term("and", (Term("or", (a, b)), Term("not", (Term("and", (a, b)),))))


def _whole(a: sympy.Expr, b: sympy.Expr) -> tuple[Term, Term]:
    """Both sides of a comparison, multiplied out if they have fractions."""
    (na, da), (nb, db) = a.as_numer_denom(), b.as_numer_denom()
    if da == 1 and db == 1:
        return _number(a), _number(b)
    if not (da.is_Integer and db.is_Integer):
        raise ValueError(f"cannot evaluate the fraction in {a} and {b} in a mask predicate")
    return _number(na * db), _number(nb * da)


def _number(e: Any) -> Term:
    if e in (H, I, J):
        return Term("var", value=str(e))
    if isinstance(e, sympy.Integer):
        return Term("const", value=int(e))
    if isinstance(e, sympy.Add):
        return Term("add", tuple(_number(a) for a in e.args))
    if isinstance(e, sympy.Mul):
        return Term("mul", tuple(_number(a) for a in e.args))
    if isinstance(e, sympy.Pow) and e.exp.is_Integer and 2 <= int(e.exp) <= 4:
        return Term("mul", (_number(e.base),) * int(e.exp))
    if isinstance(e, sympy.Abs):
        return Term("abs", (_number(e.args[0]),))
    if isinstance(e, sympy.Max | sympy.Min):
        op: Number = "max" if isinstance(e, sympy.Max) else "min"
        return Term(op, tuple(_number(a) for a in e.args))
    if isinstance(e, sympy.floor):
        return _divide(e, *e.args[0].as_numer_denom())
    if isinstance(e, sympy.ceiling):
        top, bottom = e.args[0].as_numer_denom()
        return Term("mul", (Term("const", value=-1), _divide(e, -top, bottom)))
    if isinstance(e, sympy.Mod) and e.args[1].is_Integer and e.args[1] > 0:
        return Term("mod", (_number(e.args[0]), _number(e.args[1])))
    raise ValueError(f"cannot evaluate {e} in a mask predicate")


def _divide(e: sympy.Expr, top: sympy.Expr, bottom: sympy.Expr) -> Term:
    if not (bottom.is_Integer and bottom > 0):
        raise ValueError(f"cannot evaluate {e} in a mask predicate: the divisor is not a constant")
    return Term("floordiv", (_number(top), _number(bottom)))


def evaluate(
    predicate: Boolean, i: torch.Tensor, j: torch.Tensor, h: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of a predicate.

    Args:
        predicate: over (h, i, j).
        i, j, h: int64 positions and heads that broadcast together; `h` may be left out if the
            predicate does not depend on it.

    Returns:
        bool tensor; an axis on which the predicate does not depend may have size 1.

    Raises:
        ValueError: the predicate cannot be lowered, or depends on a head that was not given.
    """
    term = lower(predicate)
    if h is None and "h" in term.names:
        raise ValueError(f"the mask predicate {predicate} depends on the head: give h")
    if term.op in ("true", "false"):
        return torch.full_like(i - j, term.op == "true", dtype=torch.bool)
    out: torch.Tensor = value(term, {"i": i, "j": j, "h": h})
    return out


_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
    "le": lambda a, b: torch.as_tensor(a <= b),
    "lt": lambda a, b: torch.as_tensor(a < b),
    "eq": lambda a, b: torch.as_tensor(a == b),
    "ne": lambda a, b: torch.as_tensor(a != b),
    "min": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "max": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
}


def value(term: Term, at: Mapping[str, torch.Tensor | None]) -> Any:
    """A term at int64 tensors; constants stay Python numbers."""
    if term.op == "var":
        return at[str(term.value)]
    if term.op == "const":
        return term.value
    if term.op in ("true", "false"):
        return torch.tensor(term.op == "true")
    parts = [value(a, at) for a in term.args]
    if term.op == "table":
        assert isinstance(term.value, Table)
        return _read(term.value, parts)
    if term.op == "not":
        return ~parts[0]
    if term.op == "abs":
        return abs(parts[0])
    return reduce(_BINARY[term.op], parts)


def _read(table: Table, parts: list[Any]) -> torch.Tensor:
    inside, flat = torch.tensor(True), torch.tensor(0)
    for x, size in zip(map(torch.as_tensor, parts), table.shape, strict=True):
        inside = inside & (x >= 0) & (x < size)
        flat = flat * size + x.clamp(0, max(size - 1, 0))
    if not table.values.size:
        return inside & (flat < 0)
    values = torch.tensor(table.values.reshape(-1), device=flat.device)
    return values[flat] & inside
