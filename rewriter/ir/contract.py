"""The outcome of one contract check on a person's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["pass", "fail", "not applicable", "reported"]

CONTRACTS: Mapping[int, str] = {
    1: "nothing unaccounted",
    2: "head map",
    3: "one function, many schedules",
    4: "causality, padding, batch independence",
    5: "limit cases",
    6: "keys",
    7: "round trip",
    8: "exact tier",
    9: "teacher gap and branch ablation",
    10: "speed honesty",
}


@dataclass(frozen=True)
class ContractResult:
    """One check.

    Attributes:
        number: contract of the design, 1 to 10.
        check: what was checked, a few words.
        subject: module path, mixer, or 'model'.
        outcome: pass, fail, not applicable (detail says why), or reported (a figure, no bound).
        measured: the figure, in the unit that `check` names.
        bound: what it had to stay below or at.
        detail: anything a person needs to understand the outcome.
    """

    number: int
    check: str
    subject: str
    outcome: Outcome
    measured: float | None = None
    bound: float | None = None
    detail: str = ""

    @property
    def title(self) -> str:
        return CONTRACTS[self.number]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(
    number: int, check: str, subject: str, measured: float, bound: float, detail: str = ""
) -> ContractResult:
    """Pass if `measured` <= `bound`; NaN fails."""
    outcome: Outcome = "pass" if measured <= bound else "fail"
    return ContractResult(number, check, subject, outcome, measured, bound, detail)
