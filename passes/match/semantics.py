"""What the mask and bias tensors of a core mean."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.ir.mask import Atom, Causal, Mask
from rewriter.ir.site import PositionKind, TermRole
from rewriter.passes.match.draft import Draft
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.view import View


@dataclass(frozen=True)
class Meaning:
    """Roles of the terms, and the mask they and the causal flag make together."""

    roles: tuple[TermRole, ...]
    mask: Mask
    position: PositionKind | None = None


class Semantics:
    def __init__(self, view: View) -> None:
        self._view = view

    def of(self, draft: Draft, named: Operands) -> Meaning:
        atoms: tuple[Atom, ...] = (Causal(),) if draft.causal_flag else ()
        if not named.terms:
            return Meaning((), Mask(atoms))
        roles: tuple[TermRole, ...] = ("mask",) * len(named.terms)
        return Meaning(roles, Mask(opaque="mask is an input of the captured module"))
