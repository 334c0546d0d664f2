"""The contracts of a rewrite as one compact table: a line a check, however many sites it ran on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from rich.console import RenderableType

from rewriter.cli.tables import bullets, heading, number, plural, table
from rewriter.ir.contract import ContractResult, Outcome

_CORE = re.compile(r"(?P<mixer>\w+) at .*?(?: and (?P<more>\d+) like it)?")  # as verify names cores
_ORDER: Sequence[Outcome] = ("fail", "pass", "reported", "not applicable")


def contracts_view(results: Sequence[ContractResult]) -> list[RenderableType]:
    """Checks grouped over sites with the worst figure; failures and notes are spelled out below."""
    if not results:
        return [heading("contracts: not checked (--verify none)")]
    rows = [_row(group) for group in _grouped(results)]
    parts: list[RenderableType] = [
        heading(f"contracts: {_counts(results)}"),
        table(
            [
                ("#", "right"),
                "check",
                "subject",
                ("measured", "right"),
                ("bound", "right"),
                "result",
            ],
            rows,
            fold=("check", "subject"),
        ),
    ]
    failures = [r for r in results if r.outcome == "fail"]
    if failures:
        parts += [heading(plural(len(failures), "failure")), bullets(map(_failure, failures))]
    notes = _notes(results)
    if notes:
        parts += [heading("notes"), bullets(notes)]
    return parts


def _grouped(results: Sequence[ContractResult]) -> list[list[ContractResult]]:
    groups: dict[tuple[int, str, Outcome], list[ContractResult]] = {}
    for result in sorted(results, key=lambda r: r.number):
        groups.setdefault((result.number, result.check, result.outcome), []).append(result)
    return list(groups.values())


def _row(group: Sequence[ContractResult]) -> tuple[str, ...]:
    first = group[0]
    outcome = "n/a" if first.outcome == "not applicable" else first.outcome
    bounds = [r.bound for r in group if r.bound is not None]
    return (
        str(first.number),
        first.check,
        _subject(group),
        _measured(group),
        number(max(bounds)) if bounds else "",
        outcome,
    )


def _subject(group: Sequence[ContractResult]) -> str:
    """'model', '30 sites', 'sink_window x30': where a check ran; failures name each place."""
    cores: Counter[str] = Counter()
    whole, sites = False, set()
    for subject in dict.fromkeys(r.subject for r in group):
        core = _CORE.fullmatch(subject)
        if core is not None:
            cores[core["mixer"]] += 1 + int(core["more"] or 0)
        elif subject == "model":
            whole = True
        else:
            sites.add(subject)
    parts = ["model"] if whole else []
    parts += [mixer if n == 1 else f"{mixer} x{n}" for mixer, n in cores.items()]
    parts += [plural(len(sites), "site")] if sites else []
    return ", ".join(parts)


def _measured(group: Sequence[ContractResult]) -> str:
    """The figure of one, the worst of many; of figures without a bound the range."""
    values = [r.measured for r in group if r.measured is not None]
    if not values:
        return ""
    if group[0].number == 10 and group[0].outcome == "reported" and math.isinf(max(values)):
        return "not reached"
    low, high = number(min(values)), number(max(values))
    if group[0].outcome == "reported" and low != high:
        return f"{low} to {high}"
    return "nan" if any(math.isnan(v) for v in values) else high


def _counts(results: Sequence[ContractResult]) -> str:
    counts = Counter(r.outcome for r in results)
    words = {"pass": "passed", "fail": "failed"}
    parts = [f"{counts[o]} {words.get(o, o)}" for o in _ORDER if counts[o] or o == "pass"]
    return ", ".join(parts)


def _failure(result: ContractResult) -> tuple[str, str]:
    detail = f" ({result.detail})" if result.detail else ""
    return (
        str(result.number),
        f"{result.subject}: {result.check}: {number(result.measured)}, allowed "
        f"{number(result.bound)}{detail}",
    )


def _notes(results: Sequence[ContractResult]) -> list[tuple[str, str]]:
    """Details that are not a failure's; repeated ones once."""
    lines: dict[tuple[str, str], None] = {}
    for result in results:
        if result.detail and _worth_a_note(result):
            lines[str(result.number), f"{result.check}: {result.detail}"] = None
    return sorted(lines, key=lambda line: int(line[0]))


def _worth_a_note(result: ContractResult) -> bool:
    """What was dropped, what could not be checked, and figures that the table has no room for."""
    if result.outcome == "pass":
        return result.number in (1, 5)
    return result.outcome == "not applicable" or (
        result.outcome == "reported" and result.number != 9
    )
