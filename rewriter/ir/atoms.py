"""Atoms of masks: one condition each on query i and key j of a batch row.

`i` and `j` are absolute positions. `valid(b, j)` says that key j is not padding, `first(b)` is the
first valid token of a row, `document(b, i)` and `group(b, i)` are numbers that the call brings.
Catalogue: sparse.md section 1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import sympy
from sympy.logic.boolalg import Boolean, Or

from rewriter.ir.predicate import DOCUMENT, FIRST, GROUP, VALID, B, I, J


@dataclass(frozen=True)
class Atom:
    """One condition on (b, h, i, j)."""

    name: ClassVar[str]
    given: ClassVar[bool] = False
    """What it hides among real tokens is known only when the model is called."""

    def predicate(self) -> Boolean:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        return {"atom": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True)
class Causal(Atom):
    """j <= i."""

    name: ClassVar[str] = "causal"

    def predicate(self) -> Boolean:
        return sympy.Le(J, I)


@dataclass(frozen=True)
class Window(Atom):
    """i - j < size: the last `size` tokens including the query's own (sliding-window models)."""

    size: int
    name: ClassVar[str] = "window"

    def predicate(self) -> Boolean:
        return sympy.Lt(I - J, self.size)


@dataclass(frozen=True)
class SymmetricWindow(Atom):
    """|i - j| <= radius: the bidirectional local window."""

    radius: int
    name: ClassVar[str] = "symmetric_window"

    def predicate(self) -> Boolean:
        return sympy.Le(sympy.Abs(I - J), self.radius)


@dataclass(frozen=True)
class Chunk(Atom):
    """i // size == j // size: only the query's own chunk."""

    size: int
    name: ClassVar[str] = "chunk"

    def predicate(self) -> Boolean:
        return sympy.Eq(sympy.floor(I / self.size), sympy.floor(J / self.size))


@dataclass(frozen=True)
class WindowOrSinks(Atom):
    """i - j < size, or j among the first `sinks` tokens (StreamingLLM, absolute positions)."""

    size: int
    sinks: int
    name: ClassVar[str] = "window_or_sinks"

    def predicate(self) -> Boolean:
        return Or(sympy.Lt(I - J, self.size), sympy.Lt(J, self.sinks))


@dataclass(frozen=True)
class WindowOrStride(Atom):
    """i - j < size, or i - j is a multiple of `step` (strided sparse attention)."""

    size: int
    step: int
    name: ClassVar[str] = "window_or_stride"

    def predicate(self) -> Boolean:
        far = sympy.Eq(sympy.Mod(I - J, self.step), 0, evaluate=False)
        return Or(sympy.Lt(I - J, self.size), far)


@dataclass(frozen=True)
class Dilated(Atom):
    """i - j is a multiple of `step`."""

    step: int
    name: ClassVar[str] = "dilated"

    def predicate(self) -> Boolean:
        return sympy.Eq(sympy.Mod(I - J, self.step), 0, evaluate=False)


@dataclass(frozen=True)
class BlockCausal(Atom):
    """j // size <= i // size: everything in the query's own block and before it."""

    size: int
    name: ClassVar[str] = "block_causal"

    def predicate(self) -> Boolean:
        return sympy.Le(sympy.floor(J / self.size), sympy.floor(I / self.size))


@dataclass(frozen=True)
class CausalOrPrefix(Atom):
    """j <= i or j < size: the first `size` tokens see one another (prefix language models)."""

    size: int
    name: ClassVar[str] = "causal_or_prefix"

    def predicate(self) -> Boolean:
        return Or(sympy.Le(J, I), sympy.Lt(J, self.size))


@dataclass(frozen=True)
class ChunkAfterPadding(Atom):
    """(i - f) // size == (j - f) // size, f the row's first valid token."""

    size: int
    name: ClassVar[str] = "chunk_after_padding"

    def predicate(self) -> Boolean:
        i, j = I - FIRST(B), J - FIRST(B)
        return sympy.Eq(sympy.floor(i / self.size), sympy.floor(j / self.size))


@dataclass(frozen=True)
class Documents(Atom):
    """document(b, i) = document(b, j): packed sequences do not see each other."""

    name: ClassVar[str] = "documents"
    given: ClassVar[bool] = True

    def predicate(self) -> Boolean:
        return sympy.Eq(DOCUMENT(B, I), DOCUMENT(B, J))


@dataclass(frozen=True)
class CausalOrGroup(Atom):
    """j <= i or group(b, i) = group(b, j): a prefix or images whose tokens all see each other."""

    name: ClassVar[str] = "causal_or_group"
    given: ClassVar[bool] = True

    def predicate(self) -> Boolean:
        return Or(sympy.Le(J, I), sympy.Eq(GROUP(B, I), GROUP(B, J)))


@dataclass(frozen=True)
class KeyPadding(Atom):
    """valid(b, j) = 1: padded keys are seen by nobody."""

    name: ClassVar[str] = "key_padding"

    def predicate(self) -> Boolean:
        return sympy.Eq(VALID(B, J), 1)


ATOMS: Mapping[str, type[Atom]] = {
    a.name: a
    for a in (
        Causal,
        Window,
        SymmetricWindow,
        Chunk,
        WindowOrSinks,
        WindowOrStride,
        Dilated,
        BlockCausal,
        CausalOrPrefix,
        ChunkAfterPadding,
        KeyPadding,
        Documents,
        CausalOrGroup,
    )
}
