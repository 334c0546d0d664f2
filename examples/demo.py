"""The main job on a real model: inspect, convert, distil, judge, generate.

    make demo        (or: python examples/demo.py --assets assets --out out/demo)

Takes SmolLM2-135M-Instruct as a Python package carries it (4-bit GGUF), keeps 8 of its 30
attention layers, gives the others a window of 64 tokens, 4 sinks and a linear far field, distils
for a few minutes on public-domain text, and prints teacher and students side by side. Every step
but the comparison is a command that can be typed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rewriter.plan import Plan

HERE = Path(__file__).parent
TEXT = HERE / "data" / "state_of_the_union.txt"
RECIPE = HERE / "demo_distill.yaml"
POLICY = "smollm2-hybrid"
JUDGED = ("perplexity", "copy perplexity")
KEPT_OPTIONS = ("window", "sinks")
LENGTH = 1024
ROWS = 2
console = Console()


def step(title: str) -> None:
    console.rule(f"[bold]{title}")


def run(*words: str) -> None:
    """Run one `rewriter` command in its own process and show it first."""
    console.print(f"$ rewriter {shlex.join(words)}", style="bold cyan", highlight=False)
    subprocess.run([sys.executable, "-m", "rewriter", *words], check=True)


def compare(teacher: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Teacher and students on held-out text, with intervals; also what each branch is worth."""
    import torch

    from rewriter import plan_of
    from rewriter.checkpoint import load, open_checkpoint
    from rewriter.cli.show_quality import quality_view
    from rewriter.distill.data import packed_corpus
    from rewriter.evaluate import QualityReport, SuiteOptions, measure, without_branch
    from rewriter.passes.realise import apply_plan, share_parameters

    torch.set_num_threads(threads)
    source = open_checkpoint(teacher, dtype="float32")
    tokenizer, original = source.tokenizer, source.model
    rows = packed_corpus(TEXT, tokenizer, LENGTH, 0.1).held_out.ids
    everything = SuiteOptions(rows=ROWS, copy_samples=3, passkey_lengths=(256,), passkey_samples=4)
    few = replace(everything, metrics=("perplexity", "copy"))
    distilled = load(folder / "distilled", dtype="float32")
    window_only = apply_plan(share_parameters(original), _window_only(plan_of(distilled)))
    models = {
        "teacher": original,
        "window only": window_only,
        "untrained": load(folder / "converted", dtype="float32"),
        "distilled": distilled,
    }
    columns = {}
    for name, model in models.items():
        with console.status(f"measuring {name}"):
            gap_to = original if name == "distilled" else None
            suite = everything if name in ("teacher", "distilled") else few
            columns[name] = measure(model, tokenizer, rows, teacher=gap_to, options=suite)
    ablation = {"nothing": {m: columns["distilled"][m] for m in JUDGED}}
    with console.status("measuring without the linear branch"), without_branch(distilled, "linear"):
        ablation["linear"] = measure(distilled, tokenizer, rows, options=few)
    report = QualityReport(columns, ablation, "distilled", (_gain(columns, ablation),))
    console.print(*quality_view(report))
    return report.to_json()


def _window_only(plan: Plan) -> Plan:
    """The same placement and window without a linear branch: what it has to beat."""
    decisions = [
        d
        if d.target == "keep"
        else d.model_copy(
            update={"target": "sink_window", "options": {k: d.options[k] for k in KEPT_OPTIONS}}
        )
        for d in plan.decisions
    ]
    return plan.model_copy(update={"decisions": decisions})


def _gain(columns: Any, ablation: Any) -> str:
    """What the linear branch adds, in words and figures, also if it adds nothing."""
    parts = []
    for metric in JUDGED:
        on = columns["distilled"][metric].value
        off = ablation["linear"][metric].value
        window = columns["window only"][metric].value
        parts.append(f"{metric} {on:.3f} with it, {off:.3f} switched off, {window:.3f} window only")
    return "The linear branch of the distilled student: " + "; ".join(parts) + "."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    teacher = next((options.assets / "smollm2").glob("*.gguf"))
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    step("1. what is in the checkpoint")
    run("inspect", str(teacher))
    step("2. convert by a shipped policy, every contract checked")
    run("convert", str(teacher), "--policy", POLICY, "--out", str(out / "converted"),
        "--dtype", "float32")  # fmt: skip
    step("3. distil")
    run("distill", str(teacher), str(out / "converted"), "--text", str(TEXT),
        "--config", str(RECIPE), "--out", str(out / "distilled"))  # fmt: skip
    step("4. judge: held-out text the students never saw")
    figures = compare(teacher, out, options.threads)
    (out / "quality.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    step("5. generate, in a new process, from the checkpoint")
    prompt = "Once upon a time, there was a"
    run("generate", str(out / "distilled"), "--prompt", prompt, "--max-new-tokens", "60")
    minutes = (time.monotonic() - start) / 60
    console.print(f"done in {minutes:.1f} minutes; the checkpoint is {out / 'distilled'}")


if __name__ == "__main__":
    main()
