"""Code this project was not written for: models of the packages that happen to be installed.

    pip install timm x-transformers ...     # any of those named in examples/zoo/installed.py
    python examples/third_party.py [--only NAME ...] [--again] [--into docs]

Each model is built small with random weights. The softmaxes counted while it runs are held against
the blocks that are found; then it is rewritten with `identity` (every output bit must stay), with
exact kernels (1e-5 of the largest output), and, where it is a causal language model, with a sliding
window, every block of which must be possible. One row a model, written to third_party.{json,md}; a
package that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from zoo.family import enliven
from zoo.installed import CASES as VISION_AND_X
from zoo.installed import Case
from zoo.libraries import LIBRARIES
from zoo.oracle import count_softmaxes

import rewriter
from rewriter.errors import RewriterError

CASES = (*VISION_AND_X, *LIBRARIES)
DOCS = Path(__file__).resolve().parent.parent / "docs"
EXACT: Mapping[str, Any] = {"rules": [{"use": "fused"}]}
WINDOW: Mapping[str, Any] = {"rules": [{"use": "sink_window", "options": {"window": 4}}]}


@dataclass
class Row:
    """A line of the table.

    Attributes:
        expected, found: attention blocks that are there and that are found.
        facts: what was read of the found blocks: mask, heads, position.
        refused: reasons, with how often each was given.
        identity, exact, window: 'yes', the error, or the sentence that refused the rewrite.
        crash: the last lines of a traceback where a sentence was due.
    """

    name: str
    package: str
    version: str
    softmaxes: int = 0
    expected: int = 0
    found: int = 0
    facts: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    identity: str = ""
    exact: str = ""
    window: str = ""
    crash: str = ""
    seconds: float = 0.0


def run(case: Case, installed: str) -> Row:
    row = Row(case.name, case.package, installed)
    begun = time.perf_counter()
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # another function than its modules compute
    model = enliven(case.build()).eval()
    inputs = case.inputs()
    row.softmaxes = count_softmaxes(model, inputs)
    row.expected = row.softmaxes - case.other + case.silent
    try:
        _look(row, model, inputs)
        if row.found:
            row.identity = _rewritten(model, "identity", inputs, 0.0)
            row.exact = _rewritten(model, EXACT, inputs, 1e-5)
            if case.language:
                row.window = _rewritten(model, WINDOW, inputs, None)
    except Exception:
        row.crash = traceback.format_exc().strip().splitlines()[-1]
    row.seconds = round(time.perf_counter() - begun, 1)
    return row


def _look(row: Row, model: nn.Module, inputs: Any) -> None:
    found = rewriter.inspect(model, inputs)
    row.found = len(found.sites)
    facts: Counter[str] = Counter()
    for site in found.sites:
        heads = site.heads
        extra = [
            f"{heads.query}/{heads.key_value} heads of {heads.key_dim}/{heads.value_dim}",
            site.mask.describe(),
            site.position + (f" {site.rotary_dim}" if site.rotary_dim else ""),
        ]
        extra += [n for n in ("cross", "qk_norm", "sinks", "softcap") if getattr(site, n)]
        facts[", ".join(extra)] += 1
    row.facts = tuple(f"{n}: {what}" for what, n in facts.items())
    reasons = Counter(f"{m.reason} [{m.source.node}]" for m in found.misses)
    row.refused = tuple(f"{n}: {why}" for why, n in reasons.items())


def _rewritten(model: nn.Module, policy: Any, inputs: Any, bound: float | None) -> str:
    """'yes', or what is wrong with the rewritten model, or the sentence of the refusal."""
    try:
        result = rewriter.rewrite(model, policy, inputs, on_miss="ignore", verify="quick")
    except RewriterError as error:
        return f"{type(error).__name__}: {error}"
    kept = [d for d in rewriter.plan_of(result).decisions if d.status == "refused"]
    said = f"; {len(kept)} refused: {kept[0].reason}" if kept else ""
    if bound is None:
        return f"yes{said}"
    with torch.no_grad():
        before, after = _call(model, inputs), _call(result, inputs)
    worst = max((_difference(a, b) for a, b in zip(before, after, strict=True)), default=0.0)
    return f"{'yes' if worst <= bound else 'no'} ({worst:.1g}){said}"


def _call(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else 1.0
    largest = a.abs().max().item() or 1.0
    return 0.0 if torch.equal(a, b) else (a - b).abs().max().item() / largest


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, in the order of the cases, and below it what was refused and why."""
    known = [rows[case.name] for case in CASES if case.name in rows]
    whole = [r for r in known if not r["crash"]]
    packages = sorted({f"{r['package']} {r['version']}" for r in known})
    out = [
        "# Models of other packages",
        "",
        "Code this project was not written for: small random models of packages as they are",
        "published, found by `python examples/third_party.py` (in an environment that has them;",
        "it leaves out what is not installed). *Ran* is the number of attention softmaxes counted",
        "while the model runs; *exact* is the rewrite on generated kernels, held to 1e-5 of the",
        "largest output; *window* is a sliding window in every block of a causal language model.",
        "`-` was not asked for, `refused` gives a sentence. The fast path of torch's own encoder",
        "layers is switched off: it is another function than the one that is rewritten. A row is",
        "as it was last run; it may be older than the newest rules of the matcher.",
        "",
        f"{', '.join(packages)}.",
        "",
        f"{len(known)} models: {sum(r['found'] for r in known)} of "
        f"{sum(r['expected'] for r in known)} blocks found; identity keeps every bit in "
        f"{sum(r['identity'].startswith('yes') for r in known)} of "
        f"{sum(bool(r['identity']) for r in known)} rewrites, "
        f"{len(known) - len(whole)} tracebacks.",
        "",
        "| model | ran | found | read as | identity | exact | window |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in known:
        facts = "<br>".join(r["facts"]).replace("|", "/") or "-"
        crash = "traceback" if r["crash"] else ""
        cells = [crash or _short(r[key]) for key in ("identity", "exact", "window")]
        out.append(
            f"| {r['name']} | {r['expected']} | {r['found']} | {facts} | {' | '.join(cells)} |"
        )
    refused = [f"- {r['name']}: {why.split(' [')[0]}" for r in known for why in r["refused"]]
    sentences = [
        f"- {r['name']}, {key}: {r[key].split('first reason, ')[-1].splitlines()[0][:200]}"
        for r in known
        for key in ("identity", "exact", "window")
        if _short(r[key]) == "refused"
    ]
    out += ["", "## Softmaxes that are not rewritten, and why", "", *refused]
    return "\n".join([*out, "", "## Rewrites that were refused", "", *sentences]) + "\n"


def _without_places(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the places of files on this machine."""
    place = re.compile(r"\s*\((?:/|unknown source)[^()]*\)")
    return json.loads(place.sub("", json.dumps(row)))


def _short(said: str) -> str:
    if not said:
        return "-"
    if said.startswith(("yes", "no (")):
        return said.split(";")[0]
    return "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--again", action="store_true", help="run rows that are in the table")
    parser.add_argument("--into", type=Path, default=DOCS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    path = options.into / "third_party.json"
    for case in CASES:
        if options.only and not any(part in case.name for part in options.only):
            continue
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if case.name in rows and not options.again:
            continue
        try:
            installed = version(case.package)
        except PackageNotFoundError:
            continue
        try:
            row = run(case, installed)
        except Exception:  # the model itself does not run here
            sys.stdout.write(f"{case.name}: NOT BUILT {traceback.format_exc(limit=-2)}\n")
            continue
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rows[case.name] = _without_places(asdict(row))
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        sys.stdout.write(
            f"{case.name}: {row.found} of {row.expected}, {row.facts}, refused {row.refused}, "
            f"identity {row.identity}, exact {row.exact}, window {row.window} {row.crash} "
            f"({row.seconds} s)\n"
        )
        sys.stdout.flush()
    if path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))
        (options.into / "third_party.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
