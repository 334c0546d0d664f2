"""Sensitivities as a table: one line a site."""

from __future__ import annotations

from rich.console import RenderableType

from rewriter.cli.tables import Column, bullets, heading, number, table
from rewriter.planner.sensitivity import Sensitivities, SiteSensitivity


def sensitivity_view(found: Sensitivities) -> list[RenderableType]:
    """Statistics of the original, then each candidate's effects."""
    parts: list[RenderableType] = [heading("the original attention (means over heads)")]
    columns: list[Column] = [
        ("#", "right"),
        ("entropy", "right"),
        ("mass in window", "right"),
        ("logit spread", "right"),
        ("best retrieval", "right"),
        ("block similarity", "right"),
    ]
    parts.append(table(columns, [_statistics(site) for site in found.sites]))
    labels = dict.fromkeys(label for s in found.sites for label in s.gap)
    for label in labels:
        parts.append(heading(f"{label}: nats a token above the original"))
        parts.append(table(_EFFECTS, [_effects(s, label) for s in found.sites if label in s.gap]))
        if label in found.everywhere:
            whole = found.everywhere[label]
            text = f"in every layer: KL {number(whole.kl)}, copy loss {number(whole.copy)}"
            parts.append(bullets([("-", text)]))
    if any(site.head_swap for site in found.sites):
        parts.append(heading("a window in one key/value head alone: copy loss (KL)"))
        rows = [
            (str(s.index), *(f"{number(e.copy)} ({number(e.kl)})" for e in s.head_swap))
            for s in found.sites
        ]
        width = max(len(row) for row in rows)
        heads: list[Column] = [("#", "right"), *((f"head {n}", "right") for n in range(width - 1))]
        parts.append(table(heads, [(*r, *[""] * (width - len(r))) for r in rows]))
    return parts


_EFFECTS: list[Column] = [
    ("#", "right"),
    ("gap", "right"),
    ("alone: KL", "right"),
    ("copy", "right"),
    ("restored: KL", "right"),
    ("copy", "right"),
]


def _statistics(site: SiteSensitivity) -> tuple[str, ...]:
    if not site.heads:
        return (str(site.index), "", "", "", "", number(site.similarity))
    count = len(site.heads)
    return (
        str(site.index),
        number(sum(h.entropy for h in site.heads) / count),
        number(sum(h.near for h in site.heads) / count),
        number(sum(h.spread for h in site.heads) / count),
        number(max(h.retrieval for h in site.heads)),
        number(site.similarity),
    )


def _effects(site: SiteSensitivity, label: str) -> tuple[str, ...]:
    swap, restore = site.swap.get(label), site.restore.get(label)
    return (
        str(site.index),
        number(site.gap[label]),
        *(("", "") if swap is None else (number(swap.kl), number(swap.copy))),
        *(("", "") if restore is None else (number(restore.kl), number(restore.copy))),
    )
