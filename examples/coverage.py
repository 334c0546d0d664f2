"""Which attention is found: every family of the zoo, written to docs/coverage.{json,md}.

    python examples/coverage.py [--only NAME ...] [--mode inference] [--dtype float32] [--again]

One line a case; cases already in the table are skipped unless --again is given, so a run can be
stopped and taken up again, and several runs on different families may follow one another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

from zoo import FAMILIES
from zoo.coverage import Case, Row, measure

DOCS = Path(__file__).resolve().parent.parent / "docs"


def cases(modes: Iterable[str], dtypes: Iterable[str], shapes: Iterable[str]) -> Iterator[Case]:
    """The grid: all modes and dtypes with dynamic shapes, static shapes for plain inference."""
    for mode, dtype, shape in product(modes, dtypes, shapes):
        if shape == "static" and (mode, dtype) != ("inference", "float32"):
            continue
        for family in FAMILIES.values():
            if mode == "training" and not family.training:
                continue
            if dtype == "bfloat16" and not family.half:
                continue
            for attention in family.implementations:
                yield Case(family.name, attention, mode, dtype, shape)


def load(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    rows = (Row.from_json(r) for r in json.loads(path.read_text(encoding="utf-8"))["rows"])
    return {row.case.key: row for row in rows}


def save(path: Path, rows: dict[str, Row]) -> None:
    """Rewrite the table, one row a line so that a change of one case is a change of one line."""
    order = {name: i for i, name in enumerate(FAMILIES)}
    known = [r for r in rows.values() if r.case.family in order]
    known.sort(key=lambda r: (order[r.case.family], r.case.key))
    lines = ",\n".join("  " + json.dumps(r.to_json()) for r in known)
    path.write_text('{"rows": [\n' + lines + "\n]}\n", encoding="utf-8")


def markdown(rows: Iterable[Row]) -> str:
    """A family a line: all its cases together."""
    table: dict[str, list[Row]] = {}
    for row in rows:
        table.setdefault(row.case.family, []).append(row)
    everything = [r for group in table.values() for r in group]
    out = [
        "# Coverage",
        "",
        "Every family as a tiny random model, captured and matched in each attention",
        "implementation, mode and dtype it offers, with dynamic shapes and with static ones. What",
        "is there was written down by hand and is held against the softmaxes counted while the",
        "model runs (`examples/zoo`). `fused` is the number of patterns that Inductor's",
        "`fuse_attention` replaces in the eager inference graph; MLP blocks are looked for in",
        "the cases that say how many there are. Made by `python examples/coverage.py`; the cases",
        "are in `coverage.json`.",
        "",
        f"{len(table)} families, {len(everything)} cases: "
        f"{_sum(everything, 'found')} of {_sum(everything, 'expected')} attention "
        f"blocks found, {_sum(everything, 'right')} with every fact right, "
        f"{_sum(everything, 'false')} false matches, "
        f"{_sum(everything, 'refused')} look-alikes refused with their reason; "
        f"{_sum(everything, 'mlps_right')} of {_sum(everything, 'mlps')} MLP blocks found with "
        f"the right activation, {_sum(everything, 'mlps_false')} false; "
        f"{sum(not r.wrong for r in everything)} cases are wholly as they should be.",
        "",
        "| attention | mode | dtype | shapes | cases | found | facts right | false | MLPs right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for r in everything:
        kind = (r.case.attention, r.case.mode, r.case.dtype, r.case.shapes)
        kinds.setdefault(kind, []).append(r)
    for kind, group in sorted(kinds.items()):
        out.append(
            f"| {' | '.join(kind)} | {len(group)} | "
            f"{_sum(group, 'found')} of {_sum(group, 'expected')} | {_sum(group, 'right')} | "
            f"{_sum(group, 'false')} | {_sum(group, 'mlps_right')} of {_sum(group, 'mlps')} |"
        )
    out += [
        "",
        "| family | cases | attention blocks | found | facts right | false | refused | fused "
        "| MLP blocks | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in table.items():
        fused = [r.fused for r in group if r.fused >= 0]
        out.append(
            f"| {name} | {len(group)} | {max(r.expected for r in group)} | "
            f"{_share(group, 'found', 'expected')} | {_share(group, 'right', 'expected')} | "
            f"{_sum(group, 'false')} | {max(r.refused for r in group)} | "
            f"{max(fused) if fused else '-'} | {max(0, *(r.mlps for r in group))} | "
            f"{_share(group, 'mlps_right', 'mlps')} |"
        )
    notes = [f"- `{r.case.key}`: {w}" for r in everything for w in r.wrong]
    if notes:
        out += ["", "## What is not as it should be", "", *notes]
    return "\n".join(out) + "\n"


def _sum(rows: Iterable[Row], name: str) -> int:
    return sum(max(getattr(r, name), 0) for r in rows)  # -1: not counted


def _share(rows: list[Row], part: str, whole: str) -> str:
    if all(getattr(r, part) == getattr(r, whole) for r in rows):
        return "all"
    return f"{_sum(rows, part)} of {_sum(rows, whole)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--mode", nargs="*", default=["inference", "training"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="*", default=["dynamic", "static"])
    parser.add_argument("--again", action="store_true", help="run cases that are in the table")
    parser.add_argument("--into", type=Path, default=DOCS)
    options = parser.parse_args()
    path = options.into / "coverage.json"
    for case in cases(options.mode, options.dtype, options.shapes):
        if options.only and case.family not in options.only:
            continue
        rows = load(path)  # another run may have added to it
        if case.key in rows and not options.again:
            continue
        counted = (case.attention, case.mode, case.dtype, case.shapes)
        fused = counted == ("eager", "inference", "float32", "dynamic")
        row = measure(case, FAMILIES[case.family], count_fused=fused)
        rows = {**load(path), case.key: row}
        save(path, rows)
        verdict = "; ".join(row.wrong) or "as it should be"
        sys.stdout.write(f"{case.key}: {row.right} of {row.expected}, {verdict}\n")
        sys.stdout.flush()
    (options.into / "coverage.md").write_text(markdown(load(path).values()), encoding="utf-8")


if __name__ == "__main__":
    main()
