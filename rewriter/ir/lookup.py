"""Table atoms: `T[h, i // c, j // c]` as a sympy condition that carries its own data.

Random and butterfly patterns, global tokens and other masks that no formula describes are tables
over blocks. The table is part of the predicate: equal data, equal predicate, equal hash.
Catalogue: sparse.md section 1.1 (table lookup).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray
from sympy.logic.boolalg import BooleanFunction


class Table(sympy.Basic):
    """A boolean array of 1 to 3 axes, immutable and hashable by content."""

    # sympy's `Basic` has slots; these objects keep their arrays beside them.
    __slots__ = ("__dict__", "data", "shape")
    data: bytes
    shape: tuple[int, ...]

    def __new__(cls, data: bytes, shape: tuple[int, ...]) -> Table:
        self: Table = super().__new__(cls)
        self.data, self.shape = data, shape
        return self

    def _hashable_content(self) -> tuple[Any, ...]:
        return (self.data, self.shape)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (Table, (self.data, self.shape))

    def _sympystr(self, printer: Any) -> str:
        return f"table{list(self.shape)}"

    @cached_property
    def values(self) -> NDArray[np.bool_]:
        """The table, read-only."""
        return np.frombuffer(self.data, dtype=np.bool_).reshape(self.shape)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of true entries before each corner: one longer than the table on every axis."""
        out = np.zeros(tuple(n + 1 for n in self.shape), dtype=np.int64)
        inner = self.values.astype(np.int64)
        for axis in range(inner.ndim):
            inner = inner.cumsum(axis)
        out[tuple(slice(1, None) for _ in self.shape)] = inner
        return out


class Lookup(BooleanFunction):
    """A `Table` read at integer expressions; false outside the table. Built by `lookup`."""

    @classmethod
    def eval(cls, table: Table, *index: sympy.Expr) -> None:
        """Never simplified."""


def lookup(values: ArrayLike, *index: sympy.Expr | int) -> Lookup:
    """The condition values[index] over (h, i, j), for example lookup(T, H, I // 64, J // 64).

    Args:
        values: boolean array of 1 to 3 axes.
        index: one integer expression per axis; outside the table the condition is false.

    Raises:
        ValueError: the number of indices is not that of the axes, or not 1 to 3.
    """
    array = np.ascontiguousarray(values, dtype=np.bool_)
    if array.ndim != len(index) or not 1 <= array.ndim <= 3:
        raise ValueError(f"a table of {array.ndim} axes cannot be read at {len(index)} indices")
    return Lookup(Table(array.tobytes(), array.shape), *(sympy.sympify(x) for x in index))
