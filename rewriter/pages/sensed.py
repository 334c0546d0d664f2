"""Section about what each layer would lose, as `rewriter sensitivity` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.pages.content import Cell, Chart, Facts, Grid, Item, Line, Section, Words, number

_MOST = 5


def sensitive(result: Mapping[str, Any]) -> Sequence[Section]:
    """Loss of copying and KL when one site alone is changed, and the sites that lose most."""
    sites, everywhere = result["sites"], result["everywhere"]
    labels = list(dict.fromkeys(label for site in sites for label in site.get("swap", {})))
    facts = [("loss of the original on repeats", number(result["copy_loss"]))]
    facts += [
        (f"{label} in all sites", f"{number(effect['copy'])} more")
        for label, effect in everywhere.items()
    ]
    items: list[Item] = [
        Facts(tuple(facts)),
        Words(
            "One site alone is changed, all others stay; nats a token above the original. What "
            "single sites lose does not add up."
        ),
    ]
    for key, title in (
        ("copy", "Loss of copying, one site changed"),
        ("kl", "KL, one site changed"),
    ):
        lines = tuple(Line(label, _points(sites, label, key)) for label in labels)
        if lines:
            items.append(Chart(title, "site", "nats a token", lines))
    rows = []
    for label in labels:
        worst = sorted(sites, key=lambda s: -s.get("swap", {}).get(label, {}).get("copy", 0.0))
        for site in worst[:_MOST]:
            effect = site.get("swap", {}).get(label)
            if effect is not None:
                figures = (Cell(number(effect["copy"])), Cell(number(effect["kl"])))
                rows.append((Cell(label), Cell(site["fqn"]), *figures))
    if rows:
        head = ("changed to", "site that loses most", "copying", "KL")
        items.append(Grid(head, tuple(rows), frozenset({2, 3})))
    return [Section("What each site would lose", tuple(items))]


def _points(
    sites: Sequence[Mapping[str, Any]], label: str, key: str
) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(site["index"]), float(site["swap"][label][key]))
        for site in sites
        if label in site.get("swap", {})
    )
