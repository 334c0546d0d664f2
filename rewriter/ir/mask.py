"""Masks as predicates over (b, h, i, j): which key j may query i of batch row b and head h see.

A mask is a conjunction of atoms. Each atom is a plain value that serialises safely, states its
predicate in sympy and is closed under the block algebra of sparse attention (catalogue: sparse.md
section 1.1). `i` and `j` are absolute positions; `valid(b, j)` says that key j is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from sympy.logic.boolalg import And, Boolean

from rewriter.ir.atoms import (
    ATOMS,
    Atom,
    BlockCausal,
    Causal,
    CausalOrGroup,
    CausalOrPrefix,
    Chunk,
    ChunkAfterPadding,
    Dilated,
    Documents,
    KeyPadding,
    SymmetricWindow,
    Window,
    WindowOrSinks,
    WindowOrStride,
)
from rewriter.ir.predicate import VALID, B, H, I, J, evaluate

__all__ = [
    "ATOMS",
    "VALID",
    "Atom",
    "B",
    "BlockCausal",
    "Causal",
    "CausalOrGroup",
    "CausalOrPrefix",
    "Chunk",
    "ChunkAfterPadding",
    "Dilated",
    "Documents",
    "H",
    "I",
    "J",
    "KeyPadding",
    "Mask",
    "SymmetricWindow",
    "Window",
    "WindowOrSinks",
    "WindowOrStride",
    "evaluate",
]


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
    def given(self) -> bool:
        """Among real tokens too, what is hidden is known only when the model is called."""
        return any(a.given for a in self.atoms)

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
        """What is left where every key is valid."""
        atoms = (a for a in self.atoms if not isinstance(a, KeyPadding))
        return Mask(
            tuple(Chunk(a.size) if isinstance(a, ChunkAfterPadding) else a for a in atoms),
            self.opaque,
        )

    def neutral(self) -> Mask:
        """What is left of a call without padding, with one document and without groups."""
        atoms = (a for a in self.without_padding().atoms if not isinstance(a, Documents))
        return Mask(
            tuple(Causal() if isinstance(a, CausalOrGroup) else a for a in atoms), self.opaque
        )

    def dense(
        self, queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Evaluate the predicate.

        Args:
            queries: (Nq,) int64, absolute query positions.
            keys: (Nk,) int64, absolute key positions.
            valid: (batch, Nk) bool, needed when the mask has key padding; None means all valid.

        Documents and groups, which only a call brings, count as one document and no group.

        Returns:
            Boolean tensor (Nq, Nk), or (batch, 1, Nq, Nk) when `valid` is given.
        """
        i, j = queries[:, None], keys[None, :]
        shifted = [a for a in self.atoms if isinstance(a, ChunkAfterPadding)]
        if valid is None or not self.padding:
            shifted = []
        fixed = Mask(tuple(a for a in self.atoms if a not in shifted), self.opaque)
        out = evaluate(fixed.neutral().predicate, i, j).expand(queries.numel(), keys.numel())
        if valid is not None and self.padding:
            out = out[None, None] & valid[:, None, None, :]
            for atom in shifted:
                out = out & _shifted(atom, i, j, valid)
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


def _shifted(
    atom: ChunkAfterPadding, i: torch.Tensor, j: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """(batch, 1, Nq, Nk): chunks counted from the first valid key of each row."""
    first = valid.int().argmax(-1)[:, None, None, None]
    return (i - first).div(atom.size, rounding_mode="floor") == (j - first).div(
        atom.size, rounding_mode="floor"
    )


@lru_cache(maxsize=256)
def _conjunction(atoms: tuple[Atom, ...]) -> Boolean:
    """Memoised: building a sympy expression takes a millisecond, evaluating it microseconds."""
    return And(*(a.predicate() for a in atoms))
