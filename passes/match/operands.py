"""From a contraction back to the operand a mixer wants: before layout, head repetition, scaling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.passes.match.draft import Labelled
from rewriter.passes.match.view import View
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.layout import backward
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import arguments, op, operand


@dataclass(frozen=True)
class Factor:
    """A scalar factor on an operand."""

    value: float
    divide: bool

    @property
    def factor(self) -> float:
        return 1.0 / self.value if self.divide else self.value


@dataclass(frozen=True)
class Entry:
    """A node on the way back, its axes, and the factors between it and the contraction.

    `direct`: only no-ops and factors lie between it and the entry before.
    """

    node: fx.Node
    labels: Labels
    factors: tuple[Factor, ...] = ()
    direct: bool = False


def chain(start: Labelled, view: View, axes: Axes) -> tuple[Entry, ...]:
    """All places where the operand could be taken, from the contraction backwards."""
    out = [Entry(start.node, start.labels)]
    while True:
        last = out[-1]
        found = scalar_factor(last.node, view)
        if found is not None:
            factor, source = found
            out.append(Entry(source, last.labels, (factor, *last.factors), direct=True))
            continue
        step = backward(last.node, last.labels, axes, view.sizes)
        if step is None:
            return tuple(out)
        out.append(Entry(step.source, step.labels, last.factors, direct=is_noop(last.node)))


def scalar_factor(node: fx.Node, view: View) -> tuple[Factor, fx.Node] | None:
    """Read a node as tensor times constant."""
    if op(node) not in ("mul", "div") or arguments(node).get("rounding_mode"):
        return None
    divide = op(node) == "div"
    number = view.constants.scalar(node.args[1])
    if number is not None and isinstance(node.args[0], fx.Node):
        return (Factor(number, divide), operand(node, 0)) if number != 0.0 else None
    number = view.constants.scalar(node.args[0])
    if number is not None and not divide and isinstance(node.args[1], fx.Node):
        return (Factor(number, divide), operand(node, 1)) if number != 0.0 else None
    return None


def leaves_of(entry: Entry, axes: Axes) -> frozenset[int]:
    return frozenset(a for dim in axes.resolve(entry.labels) for a in dim)


_COPIES = frozenset({"slice", "contiguous", "clone", "alias", "detach"})


def absorb(entries: tuple[Entry, ...], index: int) -> int:
    """Move on past copies and factors that stand directly on the chosen entry.

    Casts that change nothing in this capture are left outside, since in another dtype they may
    change something; they are only passed on the way to a factor.
    """
    best = index
    while (
        best + 1 < len(entries) and entries[best + 1].direct and op(entries[best].node) in _COPIES
    ):
        best += 1
    index = best
    for i in range(index + 1, len(entries)):
        if not entries[i].direct:
            break
        if len(entries[i].factors) > len(entries[best].factors):
            best = i
    return best


def factor_upstream(entries: tuple[Entry, ...], index: int) -> float:
    """Product of the factors behind the chosen entry (before the last layout operator)."""
    total = 1.0
    chosen = len(entries[index].factors)
    last = entries[-1].factors
    for factor in last[: len(last) - chosen]:
        total *= factor.factor
    return total
