"""Is the linear branch worth its place? Both students trained with the same budget.

    python examples/linear_branch_gain.py --assets assets --minutes 6 --hybrid out/demo/distilled

The fair comparison behind the demo: the same 8 layers kept, window 64 + 4 sinks in the others,
once with the linear far field and once without. Each student gets the same minutes; the one
without a far field has no new parameters, so all of its minutes go to the logits (LoRA).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from demo import KEPT_OPTIONS, LENGTH, POLICY, TEXT
from rich.console import Console

import rewriter
from rewriter.checkpoint import open_checkpoint
from rewriter.cli.show_quality import quality_view
from rewriter.distill import LiveProgress, distill, packed_corpus, parse_config
from rewriter.evaluate import QualityReport, SuiteOptions, measure
from rewriter.policy import Policy, Rule

console = Console()


def window_only(policy: Policy) -> Policy:
    """The shipped hybrid with its mixer replaced by the same window without a far field."""
    rules = tuple(
        rule
        if rule.use == "keep"
        else Rule(use="sink_window", options={k: rule.options[k] for k in KEPT_OPTIONS})
        for rule in policy.rules
    )
    return policy.model_copy(update={"rules": rules})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument(
        "--hybrid", type=Path, help="the demo's distilled checkpoint, if it is there"
    )
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--rows", type=int, default=4, help="judged by perplexity")
    parser.add_argument("--passages", type=int, default=6, help="judged by copying")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    corpus = packed_corpus(TEXT, source.tokenizer, LENGTH, 0.1)
    suite = SuiteOptions(
        rows=options.rows, copy_samples=options.passages, metrics=("perplexity", "copy")
    )
    hybrid = Policy.load(POLICY)
    seconds = options.minutes * 60
    budgets = {
        "with linear branch": (
            hybrid,
            {"layers": {"max_seconds": 0.45 * seconds}, "logits": {"max_seconds": 0.55 * seconds}},
        ),
        "window only": (window_only(hybrid), {"logits": {"max_seconds": seconds}}),
    }
    judged = corpus.held_out.ids
    columns = {"teacher": measure(source.model, source.tokenizer, judged, options=suite)}
    if options.hybrid is not None:
        del budgets["with linear branch"]
        student = rewriter.load(options.hybrid, dtype="float32")
        columns["with linear branch"] = measure(student, source.tokenizer, judged, options=suite)
    for name, (policy, stages) in budgets.items():
        student = rewriter.rewrite(source.model, policy, verify="none")
        config = parse_config({"length": LENGTH, "checkpoint_every": 0, **stages})
        with LiveProgress(console) as progress:
            distill(source.model, student, corpus.train, config, reporter=progress)
        columns[name] = measure(student, source.tokenizer, judged, options=suite)
    console.print(*quality_view(QualityReport(columns)))


if __name__ == "__main__":
    main()
