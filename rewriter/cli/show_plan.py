"""A plan as tables: one line a site, and what the targets mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import RenderableType

from rewriter.cli.tables import Column, bullets, heading, plural, ranges, table
from rewriter.plan import Decision, Plan


def plan_view(plan: Plan) -> list[RenderableType]:
    """Every decision, then the targets with their options, then the reasons of refusals."""
    rows = [
        (str(d.index), d.fqn or "(the model)", d.target, d.tier, d.status) for d in plan.decisions
    ]
    columns: list[Column] = [("#", "right"), "module", "target", "tier", "status"]
    parts: list[RenderableType] = [table(columns, rows, fold=("module",))]
    return [*parts, *plan_summary(plan)]


def plan_summary(plan: Plan) -> list[RenderableType]:
    """A few lines that say the same for any number of sites."""
    name = f"plan '{plan.policy}'" if plan.policy else "plan"
    parts: list[RenderableType] = [heading(f"{name}: {_counts(plan.decisions)}")]
    parts.append(bullets(_groups(plan.decisions)))
    refused = [d for d in plan.decisions if d.status == "refused"]
    if refused:
        parts.append(heading(f"{plural(len(refused), 'site')} refused, left unchanged"))
        parts.append(bullets(_reasons(refused)))
    if plan.misses:
        parts.append(heading(plural(len(plan.misses), "near miss", "near misses")))
        parts.append(bullets(("-", text) for text in plan.misses))
    return parts


def _counts(decisions: Sequence[Decision]) -> str:
    tiers = Counter("refused" if d.status == "refused" else d.tier for d in decisions)
    return f"{plural(len(decisions), 'site')} ({', '.join(f'{n} {t}' for t, n in tiers.items())})"


def _groups(decisions: Sequence[Decision]) -> list[tuple[str, str]]:
    """('22 x hedgehog_window', 'window=64, sinks=4; distilled; sites 1-6, 8-13')."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for d in decisions:
        if d.status != "refused":
            options = ", ".join(f"{k}={_value(v)}" for k, v in d.options.items()) or "no options"
            groups.setdefault((d.target, options, d.tier), []).append(d.index)
    return [
        (f"{len(members)} x {target}", f"{options}; {tier}; {_sites(members)}")
        for (target, options, tier), members in groups.items()
    ]


def _reasons(refused: Sequence[Decision]) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for d in refused:
        groups.setdefault((d.target, d.reason or "no reason given"), []).append(d.index)
    return [("-", f"{target} at {_sites(at)}: {reason}") for (target, reason), at in groups.items()]


def _value(value: object) -> str:
    return "none" if value is None else str(value)


def _sites(indices: Sequence[int]) -> str:
    return f"{'site' if len(indices) == 1 else 'sites'} {ranges(indices)}"
