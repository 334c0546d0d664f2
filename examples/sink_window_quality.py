"""What a training-free window costs: all 30 layers of SmolLM2 at window 256 + 4 sinks.

    python examples/sink_window_quality.py --assets assets

Prints perplexity and copy perplexity on 1,024-token rows and perplexity on 2,048-token rows, each
beside the full-attention model. The window looks nearly free by perplexity and is ruinous for
copying: neither number should be quoted without the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import rewriter
from rewriter.checkpoint import open_checkpoint
from rewriter.cli.show_quality import quality_view
from rewriter.distill.data import packed_corpus
from rewriter.evaluate import QualityReport, SuiteOptions, measure

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    student = rewriter.rewrite(source.model, "sink-window", verify="none")
    suites = {
        1024: SuiteOptions(rows=4, copy_samples=4, metrics=("perplexity", "copy")),
        2048: SuiteOptions(rows=3, metrics=("perplexity",)),
    }
    for length, suite in suites.items():
        rows = packed_corpus(TEXT, source.tokenizer, length, 0.1).held_out.ids
        columns = {
            name: measure(model, source.tokenizer, rows, options=suite)
            for name, model in {"teacher": source.model, "sink_window": student}.items()
        }
        console.rule(f"{length}-token rows")
        console.print(*quality_view(QualityReport(columns)))


if __name__ == "__main__":
    main()
