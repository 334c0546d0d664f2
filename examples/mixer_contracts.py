"""Every mixer under all ten contracts and against its oracle: docs/mixer_contracts.md.

    python examples/mixer_contracts.py --assets assets

Six layers of SmolLM2-135M (causal) and all of MiniLM (bidirectional) are rewritten with one mixer
each and verified in full, as every rewrite is; then the result is saved, loaded and compared, and a
loader that does not know of the rewrite has to fail. The oracles are the tests under
`tests/mixers`: they are run, and the largest error of each mixer is printed. Results are written as
each mixer is done, and a run that was stopped goes on where it was. Half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from mixer_contracts_view import markdown
from rich.console import Console
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import rewriter
from rewriter.atomic import write_file
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.errors import VerificationError
from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.compare import first_tensor, max_difference
from rewriter.passes.examples import examples_for

LAYERS = list(range(12, 18))  # of SmolLM2
WINDOW = {"window": 16, "sinks": 4}  # short, so that something is out of sight in a short call
CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "gla": {},
    "retnet": {},
    "mamba2": {},
    "gated_deltanet": {},
    "rwkv7": {},
    "s4d": {},
    "sigmoid_attention": {},
    "sink_window": WINDOW,
    "razor": {**WINDOW, "full": [0]},
    "duo": {**WINDOW, "full": [0]},
    "moba": {},
    "linear_shortcut": {},
    "drop": {},
}
BOTH_WAYS = ("hydra", "s4d", "sigmoid_attention", "linear_shortcut", "drop")
CHANNEL = ("lowrank_mlp", "monarch_mlp")
ROOT = Path(__file__).parents[1]
console = Console()


class Models:
    """The two models, each read when it is first asked for."""

    def __init__(self, assets: Path) -> None:
        self.assets = assets
        self._read: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._read:
            folder = self.assets / name
            path = next(folder.glob("*.gguf"), folder)
            self._read[name] = open_checkpoint(path, dtype="float32").model.eval()
        return self._read[name]


def verify(model: nn.Module, rule: Mapping[str, Any]) -> Sequence[ContractResult]:
    """All contracts of a rewrite by one rule, the round trip over the disk among them."""
    calls = []
    if rule.get("site") == "mlp":
        generator = torch.Generator().manual_seed(3)
        size = (2, 64)
        ids = torch.randint(0, model.config.vocab_size, size, generator=generator)  # type: ignore
        calls = [{"input_ids": ids}]
    try:
        student = rewriter.rewrite(model, {"rules": [rule]}, calibration=calls)
    except VerificationError as error:
        return tuple(error.report.contracts)  # type: ignore[attr-defined]
    return (*rewriter.report_of(student).contracts, *on_disk(student))


def summed(results: Sequence[ContractResult]) -> list[dict[str, Any]]:
    """One entry for each check and outcome: how often, and the worst (or mean reported) figure."""
    groups: dict[tuple[int, str, str], list[ContractResult]] = {}
    for r in results:
        groups.setdefault((r.number, r.check, r.outcome), []).append(r)
    out = []
    for (number, check, outcome), members in groups.items():
        figures = [float(r.measured) for r in members if r.measured is not None]
        measured = (mean if outcome == "reported" else max)(figures) if figures else None
        out.append(
            {
                "number": number,
                "check": check,
                "outcome": outcome,
                "count": len(members),
                "measured": measured,
                "bound": members[0].bound,
                "detail": members[0].detail,
            }
        )
    return out


def on_disk(student: nn.Module) -> Iterator[ContractResult]:
    """Contract 7 with real files."""
    call = examples_for(student).primary
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        student.save_pretrained(folder)  # type: ignore[operator]
        loaded = rewriter.load(folder)
        ours, theirs = (first_tensor(m(*call.args, **call.kwargs)) for m in (student, loaded))
        yield judged(
            7, "saved and loaded, the same outputs", "model", max_difference(ours, theirs), 0.0
        )
        refused = 0
        for loader in (AutoModel, AutoModelForCausalLM):
            try:
                loader.from_pretrained(folder)
            except (OSError, ValueError):
                refused += 1
        yield judged(7, "loaders that know of no rewrite that load it", "model", 2 - refused, 0)


class Recorder:
    """Runs the tests that compare with an oracle, and collects the errors they measure."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "agree" in item.fixturenames]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when != "call":
            return
        for name, value in report.user_properties:
            mixer, _, what = name.partition(" ")
            row = self.errors.setdefault(mixer, {})
            row[what] = max(row.get(what, 0.0), value)
            row[f"{what} cases"] = row.get(f"{what} cases", 0) + 1


def oracles() -> dict[str, Any]:
    """Run the oracle tests; largest relative errors by mixer.

    Raises:
        SystemExit: one of them failed.
    """
    recorder = Recorder()
    pytest.main(["-q", f"--rootdir={ROOT}", str(ROOT / "tests" / "mixers")], plugins=[recorder])
    if recorder.failed:
        raise SystemExit(f"{recorder.failed[0]} failed")
    return recorder.errors


def lines() -> dict[str, int]:
    """Lines of each file that defines a mixer."""
    folder = ROOT / "rewriter" / "mixers"
    files = [p for p in folder.glob("*/*.py") if 'name="' in p.read_text()]
    return {p.stem: len(p.read_text().splitlines()) for p in sorted(files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", nargs="*", help="rows to make, also again, and 'oracles'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = Models(options.assets)
    rules: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, given in CAUSAL.items():
        rules[name] = ("smollm2", {"layers": LAYERS, "use": name, "options": dict(given)})
    for name in BOTH_WAYS:
        rules[f"{name}, bidirectional"] = ("minilm", {"use": name})
    for name in CHANNEL:
        rules[name] = ("smollm2", {"site": "mlp", "layers": LAYERS[:2], "use": name})
    path = options.out / "mixer_contracts.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name in [*rules, "oracles"]:
        known = name in done["rows"] or name in done
        if name not in (options.only or [name]) or (known and options.only is None):
            continue
        began = time.perf_counter()
        if name == "oracles":
            done["oracles"] = oracles()
        else:
            model, rule = rules[name]
            results = verify(models[model], rule)
            done["rows"][name] = {"model": model, "results": summed(results)}
            failed = [(r.number, r.check, r.measured) for r in results if r.outcome == "fail"]
            console.print(f"{name}: {time.perf_counter() - began:.0f} s, failed {failed}")
        missing = [rule for rule in rules if rule not in done["rows"]]
        done |= {"machine": this_machine().describe(), "lines": lines(), "missing": missing}
        write_file(path, (json.dumps(done, indent=1) + "\n").encode())
    write_file(options.out / "mixer_contracts.md", markdown(done).encode())


if __name__ == "__main__":
    main()
