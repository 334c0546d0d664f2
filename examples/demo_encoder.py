"""A real sentence encoder, converted both ways: MiniLM with windows and with linear attention.

    make demo-encoder        (or: python examples/demo_encoder.py --assets assets --out out/encoder)

Prints how well the pairwise similarities of sentences agree with the original's: training-free
windows, undistilled linear attention, and the same after a minute or two of layer-by-layer
distillation on other text, with `--whole relations` (MiniLM's) or `--whole hidden` also after 40
steps of the whole student. The distilled model is saved, loaded again and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import rewriter
from rewriter.checkpoint import load, open_checkpoint, save
from rewriter.cli.show_contracts import contracts_view
from rewriter.cli.show_quality import quality_view
from rewriter.distill import LiveProgress, distill, padded_corpus, parse_config, read_texts
from rewriter.evaluate import SENTENCES, QualityReport, embed, similarity_agreement

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
WINDOWS = {"rules": [{"use": "sink_window", "options": {"window": 4, "sinks": 1}}]}
LOSSES: dict[str, dict[str, Any]] = {
    "relations": {"relations": {"of": ["qk", "vv"]}},
    "hidden": {"hidden": 1.0},
}
console = Console()


def sentences_of(path: Path) -> list[str]:
    """Sentences of 20 to 300 characters; none of them is one of the sentences judged."""
    found = [s.strip() for text in read_texts(path) for s in re.split(r"(?<=[.!?])\s+", text)]
    return [s for s in found if 20 <= len(s) <= 300 and s not in SENTENCES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("out/encoder"))
    parser.add_argument("--seconds", type=float, default=120.0, help="of distillation")
    parser.add_argument("--whole", choices=tuple(LOSSES), help="train the whole student after")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_checkpoint(options.assets / "minilm", dtype="float32")
    teacher, tokenizer = source.model, source.tokenizer
    before = embed(teacher, tokenizer)

    def agreement(model: Any) -> dict[str, Any]:
        found = similarity_agreement(before, embed(model, tokenizer))
        return {m.name: m for m in (found.pearson, found.spearman)}

    windowed = rewriter.rewrite(teacher, WINDOWS)
    student = rewriter.rewrite(teacher, "hedgehog")
    console.rule("contracts of the linear conversion")
    console.print(*contracts_view(rewriter.report_of(student).contracts))
    columns = {"window 4+1": agreement(windowed), "linear, undistilled": agreement(student)}
    rows = padded_corpus(sentences_of(TEXT), tokenizer, length=64).train
    config = parse_config(
        {"dtype": "float32", "layers": {"max_seconds": options.seconds, "batch": 16, "lr": 0.02}}
    )
    with LiveProgress(console) as progress:
        distill(teacher, student, rows, config, reporter=progress)
    columns["linear, distilled"] = agreement(student)
    if options.whole:
        stage = {"steps": 40, "batch": 16, "train": "all", "divergence": 0, **LOSSES[options.whole]}
        with LiveProgress(console) as progress:
            whole = parse_config({"dtype": "float32", "fit": 0, "logits": stage})
            distill(teacher, student, rows, whole, reporter=progress)
        columns[f"and its {options.whole}"] = agreement(student)
    console.print(*quality_view(QualityReport(columns)))
    save(student, options.out, rewriter.plan_of(student), tokenizer, overwrite=True)
    again = load(options.out)
    same = (embed(again, tokenizer) == embed(student, tokenizer)).all()
    console.print(f"saved to {options.out}, loaded again: embeddings equal bit for bit: {same}")
    figures = {k: {m: v.to_json() for m, v in row.items()} for k, row in columns.items()}
    (options.out.parent / "encoder_quality.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
