"""The report of one rewrite: what was found, decided, proved and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewriter.ir.contract import ContractResult
from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import AttentionSite, NearMiss
from rewriter.plan import Plan


@dataclass(frozen=True)
class Report:
    """Everything a rewrite can say about itself.

    Attributes:
        sites: attention blocks that were understood, in the order they run.
        mlps: MLP blocks that were understood.
        misses: what looked like attention and was refused.
        plan: the decisions that were carried out.
        contracts: outcome of every check (empty when verification was switched off).
        seconds: wall time by stage.
    """

    sites: tuple[AttentionSite, ...]
    misses: tuple[NearMiss, ...]
    plan: Plan
    contracts: tuple[ContractResult, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    mlps: tuple[MlpSite, ...] = ()

    @property
    def failures(self) -> tuple[ContractResult, ...]:
        return tuple(c for c in self.contracts if c.outcome == "fail")

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        return {
            "sites": [s.to_json() for s in self.sites],
            "mlps": [m.to_json() for m in self.mlps],
            "misses": [m.to_json() for m in self.misses],
            "plan": self.plan.model_dump(mode="json"),
            "contracts": [c.to_json() for c in self.contracts],
            "passed": self.passed,
            "seconds": self.seconds,
        }
