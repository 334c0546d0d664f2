"""One way of writing one part of a program, and the tables that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rewriter.passes.fuzz.spec import Spec

Chosen = Mapping[str, str]
"""Slot -> name of the edit chosen for it, for the slots decided so far."""

Effect = Literal["equal", "refuse", "truthful"]


def _always(spec: Spec, chosen: Chosen) -> bool:
    return True


@dataclass(frozen=True)
class Edit:
    """One spelling of one slot.

    Attributes:
        slot: the part of the program it writes.
        name: unique within the slot.
        write: the code; its signature is that of the slot.
        when: whether it can be used for a spec, given the slots chosen before.
        effect: `equal` computes what the spec says; `refuse` computes something that is no
            attention; `truthful` computes attention with other facts, so that it may be found if
            what is found describes it.
    """

    slot: str
    name: str
    write: Callable[..., Any]
    when: Callable[[Spec, Chosen], bool] = _always
    effect: Effect = "equal"


When = Callable[[Spec, Chosen], bool]


def table(
    slot: str, codes: dict[str, Any], effect: Effect = "refuse", when: When = _always
) -> tuple[Edit, ...]:
    """Edits of one slot from their code by name."""
    return tuple(Edit(slot, name, code, when, effect) for name, code in codes.items())
