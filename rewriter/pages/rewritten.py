"""Sections about one rewrite: the plan, what was refused, the contracts, how to repeat it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewriter.pages.content import (
    REFUSED,
    Block,
    Cell,
    Chart,
    Commands,
    Facts,
    Grid,
    Item,
    Line,
    Section,
    Strip,
    Tone,
    Words,
    number,
)

_TONES: Mapping[str, Tone] = {"pass": "good", "fail": "bad", "not applicable": "quiet"}


def rewritten(result: Mapping[str, Any]) -> Sequence[Section]:
    """Sections of the JSON that `rewriter convert --json` writes, or of a plan alone."""
    plan = result["plan"]
    sections = [_plan(plan, result), _refused(plan, result)]
    if result.get("contracts"):
        sections.append(_contracts(result["contracts"]))
        sections.append(_gaps(result["contracts"]))
    if result.get("checkpoint"):
        sections.append(_repeat(result, plan))
    return [s for s in sections if s.items]


def _plan(plan: Mapping[str, Any], result: Mapping[str, Any]) -> Section:
    decisions = plan["decisions"]
    blocks = tuple(
        Block(
            str(d["index"]),
            d["target"] if d["status"] != "refused" else REFUSED,
            f"{d['fqn']}: {_what(d)}",
        )
        for d in decisions
    )
    facts = [("policy", plan.get("policy") or "-"), ("attention blocks", str(len(decisions)))]
    tiers = Counter(d["tier"] for d in decisions if d["status"] != "refused")
    facts += [(f"{tier} tier", str(count)) for tier, count in tiers.items()]
    if result.get("seconds"):
        facts.append(("time", f"{sum(result['seconds'].values()):.0f} s"))
    rows = []
    for what, group in _grouped(decisions):
        first = group[0]
        rows.append(
            (
                Cell(_numbers([d["index"] for d in group])),
                Cell(what),
                Cell(first["tier"]),
                Cell(_describe_site(first.get("site") or {})),
            )
        )
    table = Grid(("layers", "becomes", "tier", "what was found there"), tuple(rows))
    return Section("The plan", (Strip(blocks), Facts(tuple(facts)), table))


def _grouped(decisions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for d in decisions:
        key = (_what(d), _describe_site(d.get("site") or {}))
        groups.setdefault(key, []).append(d)
    for (what, _), group in groups.items():
        yield what, group


def _what(decision: Mapping[str, Any]) -> str:
    if decision["status"] == "refused":
        return f"stays as it is ({decision['target']} refused)"
    options = ", ".join(f"{k} {number(v)}" for k, v in decision["options"].items() if v is not None)
    return f"{decision['target']} ({options})" if options else str(decision["target"])


def _describe_site(site: Mapping[str, Any]) -> str:
    if not site:
        return ""
    heads = site.get("heads", {})
    parts = [
        f"{heads.get('query')} query and {heads.get('key_value')} key heads "
        f"of {heads.get('key_dim')}",
        str(site.get("position", "")),
        str(site.get("spelling", "")),
    ]
    return ", ".join(p for p in parts if p)


def _numbers(values: Sequence[int]) -> str:
    """'0-3, 7'."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _refused(plan: Mapping[str, Any], result: Mapping[str, Any]) -> Section:
    rows = [
        (Cell(d["fqn"]), Cell(d.get("reason") or "", "bad"))
        for d in plan["decisions"]
        if d["status"] == "refused"
    ]
    misses = result.get("misses") or []
    for miss in misses:
        source = miss.get("source", {})
        place = source.get("module") or source.get("node", "")
        if source.get("file"):
            place += f" ({source['file'].rsplit('/', 1)[-1]}:{source.get('line')})"
        why = (f"{miss.get('stage')}: {miss.get('reason')}", miss.get("advice"))
        rows.append((Cell(place), Cell(". ".join(text for text in why if text))))
    items: list[Item] = []
    if rows:
        items.append(Grid(("where", "why"), tuple(rows)))
    elif "misses" in result:
        items.append(Words("Nothing that looks like attention was left out."))
    return Section("What was not rewritten, and why", tuple(items))


def _contracts(contracts: Sequence[Mapping[str, Any]]) -> Section:
    by_check: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for result in contracts:
        by_check.setdefault((result["number"], result["check"]), []).append(result)
    rows = []
    for (contract, check), group in sorted(by_check.items()):
        worst = max(group, key=_badness)
        outcome = worst["outcome"]
        rows.append(
            (
                Cell(str(contract)),
                Cell(check),
                Cell(outcome, _TONES.get(outcome, "plain")),
                Cell(number(worst["measured"])),
                Cell(number(worst["bound"])),
                Cell(f"{len(group)}"),
                Cell(worst.get("detail") or "", "quiet"),
            )
        )
    head = ("#", "check", "outcome", "worst", "allowed", "subjects", "detail")
    grid = Grid(head, tuple(rows), frozenset({0, 3, 4, 5}))
    note = Words("Checked on this very model. 'reported' is a figure without a bound.")
    return Section("Contracts", (note, grid))


_BRANCH = re.compile(r"gap without branch '(?P<name>.+)'")


def _gaps(contracts: Sequence[Mapping[str, Any]]) -> Section:
    """How far the output of every new core is from the original's, whole and by branch."""
    found = [c for c in contracts if c["number"] == 9 and isinstance(c["measured"], int | float)]
    sites = list(dict.fromkeys(c["subject"] for c in found))
    lines: dict[str, list[tuple[float, float]]] = {}
    for c in found:
        branch = _BRANCH.fullmatch(c["check"])
        name = f"without '{branch['name']}'" if branch else "whole core"
        lines.setdefault(name, []).append((sites.index(c["subject"]) + 1.0, float(c["measured"])))
    if len(sites) < 2:
        return Section("Gap to the original by site", ())
    note = Words(
        "Relative error of each rewritten block on what the original gave it, before training; "
        f"site 1 is {sites[0]}, site {len(sites)} is {sites[-1]}. Where a branch switched off "
        "changes nothing, it is not used yet."
    )
    drawn = tuple(Line(name, tuple(points)) for name, points in lines.items())
    chart = Chart("Gap to the original", "site in running order", "relative error", drawn)
    return Section("Gap to the original by site", (note, chart))


def _badness(result: Mapping[str, Any]) -> tuple[int, float]:
    order = ("not applicable", "reported", "pass", "fail")
    measured = result["measured"]
    value = measured if isinstance(measured, int | float) else 0.0
    return order.index(result["outcome"]), float(value)


def _repeat(result: Mapping[str, Any], plan: Mapping[str, Any]) -> Section:
    source, out = shlex.quote(str(result["checkpoint"])), shlex.quote(str(result.get("out", "out")))
    policy = shlex.quote(plan.get("policy") or "POLICY")
    lines = (f"rewriter convert {source} --policy {policy} --out {out}",)
    tool = plan.get("tool")
    note = (Words(f"attention-rewriter {tool}"),) if tool else ()
    return Section("How to repeat this", (*note, Commands(lines)))
