"""Masks as predicates over (b, h, i, j): which key j may query i of batch row b and head h see.

A mask is a conjunction of atoms. Each atom is a plain value that serialises safely, states its
predicate in sympy and is closed under the block algebra of sparse attention (catalogue: sparse.md
section 1.1). `i` and `j` are absolute positions; `valid(b, j)` says that key j is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import sympy
import torch
from sympy.logic.boolalg import And, Boolean, Or

from rewriter.ir.predicate import VALID, B, H, I, J, evaluate

__all__ = [
    "ATOMS",
    "VALID",
    "Atom",
    "B",
    "Causal",
    "Chunk",
    "H",
    "I",
    "J",
    "KeyPadding",
    "Mask",
    "SymmetricWindow",
    "Window",
    "WindowOrSinks",
    "evaluate",
]


@dataclass(frozen=True)
class Atom:
    """One condition on (b, h, i, j)."""

    name: ClassVar[str]

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
class KeyPadding(Atom):
    """valid(b, j) = 1: padded keys are seen by nobody."""

    name: ClassVar[str] = "key_padding"

    def predicate(self) -> Boolean:
        return sympy.Eq(VALID(B, J), 1)


ATOMS: Mapping[str, type[Atom]] = {
    a.name: a for a in (Causal, Window, SymmetricWindow, Chunk, WindowOrSinks, KeyPadding)
}


@dataclass(frozen=True)
class Mask:
    """A conjunction of atoms, or opaque with the reason why it was not understood.

    `Mask()` allows everything. An opaque mask is never guessed at: no mixer but `keep` accepts it.
    """

    atoms: tuple[Atom, ...] = ()
    opaque: str | None = None

    @property
    def causal(self) -> bool:
        return any(isinstance(a, Causal) for a in self.atoms)

    @property
    def padding(self) -> bool:
        return any(isinstance(a, KeyPadding) for a in self.atoms)

    @property
    def window(self) -> int | None:
        """Size of a causal sliding window, in tokens, or None."""
        return min((a.size for a in self.atoms if isinstance(a, Window)), default=None)

    @property
    def radius(self) -> int | None:
        """Radius of a bidirectional window, in tokens, or None."""
        return min((a.radius for a in self.atoms if isinstance(a, SymmetricWindow)), default=None)

    @property
    def predicate(self) -> Boolean:
        """The sympy predicate over (b, h, i, j).

        Raises:
            ValueError: the mask is opaque.
        """
        if self.opaque is not None:
            raise ValueError(f"the mask was not understood: {self.opaque}")
        return _conjunction(self.atoms)

    def without_padding(self) -> Mask:
        return Mask(tuple(a for a in self.atoms if not isinstance(a, KeyPadding)), self.opaque)

    def dense(
        self, queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Evaluate the predicate.

        Args:
            queries: (Nq,) int64, absolute query positions.
            keys: (Nk,) int64, absolute key positions.
            valid: (batch, Nk) bool, needed when the mask has key padding; None means all valid.

        Returns:
            Boolean tensor (Nq, Nk), or (batch, 1, Nq, Nk) when `valid` is given.
        """
        i, j = queries[:, None], keys[None, :]
        out = evaluate(self.without_padding().predicate, i, j)
        out = out.expand(queries.numel(), keys.numel())
        if valid is not None and self.padding:
            return out[None, None] & valid[:, None, None, :]
        return out

    def describe(self) -> str:
        """For people: 'causal & window(256) & key_padding', 'full' or 'opaque (reason)'."""
        if self.opaque is not None:
            return f"opaque ({self.opaque})"
        if not self.atoms:
            return "full"
        parts = []
        for atom in self.atoms:
            values = ", ".join(str(getattr(atom, f.name)) for f in fields(atom))
            parts.append(f"{atom.name}({values})" if values else atom.name)
        return " & ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"atoms": [a.to_json() for a in self.atoms], "opaque": self.opaque}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mask:
        atoms = []
        for item in data["atoms"]:
            values = {k: v for k, v in item.items() if k != "atom"}
            atoms.append(ATOMS[item["atom"]](**values))
        return cls(tuple(atoms), data.get("opaque"))


@lru_cache(maxsize=256)
def _conjunction(atoms: tuple[Atom, ...]) -> Boolean:
    """Memoised: building a sympy expression takes a millisecond, evaluating it microseconds."""
    return And(*(a.predicate() for a in atoms))
