"""What the backend did in each graph: a collector the caller owns, and one log line a graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewriter.ir.site import NearMiss
from rewriter.passes.splice import Applied, Outcome

_LOG = logging.getLogger("rewriter.compile")


@dataclass(frozen=True)
class GraphReport:
    """One graph that dynamo handed over.

    Attributes:
        number: counts the graphs of a report, from 0.
        outcomes: every site that was understood, in the order they run.
        misses: what looked like attention and was refused.
        nodes: nodes of the graph before and after.
        linears: linear layers that run by the faster of torch's and generated code.
        patterns: what graph patterns of other packages did.
        differentiable: the graph was compiled for training.
        seconds: our own time by stage, and 'inner', the time of the compiler behind.
    """

    number: int
    outcomes: tuple[Outcome, ...]
    misses: tuple[NearMiss, ...]
    nodes: tuple[int, int]
    differentiable: bool
    seconds: Mapping[str, float]
    linears: int = 0
    patterns: tuple[Applied, ...] = ()

    @property
    def spliced(self) -> int:
        return sum(o.status == "spliced" for o in self.outcomes)

    @property
    def own_seconds(self) -> float:
        """Time spent here, without the compiler behind."""
        return sum(t for name, t in self.seconds.items() if name != "inner")

    def summary(self) -> str:
        """'graph 0: 30 of 30 sites spliced, 2711 nodes to 1904, 4.1 s + inner 12.0 s'."""
        before, after = self.nodes
        text = f"graph {self.number}: {self.spliced} of {len(self.outcomes)} sites spliced"
        if self.misses:
            text += f", {len(self.misses)} not understood"
        if self.linears:
            text += f", {self.linears} linear layers"
        text += f", {before} nodes to {after}, {self.own_seconds:.1f} s"
        return f"{text} + inner {self.seconds.get('inner', 0.0):.1f} s"

    def describe(self) -> str:
        """The summary, then a line for each kind of outcome and each miss."""
        lines = [self.summary()]
        groups: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            text = f"{outcome.site.mask.describe()}: {outcome.status}: {outcome.what}"
            groups.setdefault(text, []).append(outcome)
        for text, group in groups.items():
            names = [o.site.fqn or "the model itself" for o in group]
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
            worst = max((o.difference for o in group if o.difference is not None), default=None)
            proof = "" if worst is None else f", differs by {worst:.0e} at most"
            lines.append(f"  {shown}: {text}{proof}")
        lines.extend(f"  pattern {applied.describe()}" for applied in self.patterns)
        lines.extend(f"  not understood: {miss.describe()}" for miss in self.misses)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "sites": [
                {
                    "fqn": o.site.fqn,
                    "mask": o.site.mask.describe(),
                    "status": o.status,
                    "what": o.what,
                    "difference": o.difference,
                }
                for o in self.outcomes
            ],
            "misses": [m.to_json() for m in self.misses],
            "nodes": list(self.nodes),
            "linears": self.linears,
            "patterns": {a.name: a.replaced for a in self.patterns},
            "differentiable": self.differentiable,
            "seconds": dict(self.seconds),
        }


@dataclass
class CompileReport:
    """Collects the reports of all graphs; pass one as `options={"report": CompileReport()}`."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def spliced(self) -> int:
        return sum(g.spliced for g in self.graphs)

    def describe(self) -> str:
        """Everything for people; also what `str` gives."""
        if not self.graphs:
            return "nothing has been compiled yet; call the compiled model first"
        return "\n".join(g.describe() for g in self.graphs)

    __str__ = describe

    def to_json(self) -> dict[str, Any]:
        return {"graphs": [g.to_json() for g in self.graphs]}


def log(report: GraphReport) -> None:
    """One line at level INFO, the details at DEBUG, of the logger `rewriter.compile`."""
    _LOG.info(report.summary())
    _LOG.debug(report.describe())
