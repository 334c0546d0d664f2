"""How fast is backend="rewriter" beside backend="inductor" and eager, and how long does it compile?

    python examples/compile_speed.py --assets assets --only smollm2 --length 2048
    python examples/compile_speed.py --assets assets --only minilm
    python examples/compile_speed.py --only window --length 8192

Interleaved in one process, inference, fp32. Times to the first result include compilation; a second
run of the script shows them with warm caches. "own" is the part spent in this package.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn

import rewriter
from rewriter.checkpoint import open_checkpoint

Call = Mapping[str, Any]


def smollm2(assets: Path, length: int) -> tuple[nn.Module, Call]:
    """SmolLM2-135M, prefill of one row, logits of the last token."""
    path = next((assets / "smollm2").glob("*.gguf"))
    model = open_checkpoint(path, dtype="float32").model
    return model, {"input_ids": _ids(1, length), "use_cache": False, "logits_to_keep": 1}


def minilm(assets: Path, length: int) -> tuple[nn.Module, Call]:
    """MiniLM on a padded batch of 16 ... 256 tokens."""
    folder = next(p.parent for p in (assets / "minilm").rglob("config.json"))
    model = open_checkpoint(folder, dtype="float32").model
    lengths = torch.linspace(16, 256, 16).long()
    mask = (torch.arange(256)[None] < lengths[:, None]).long()
    return model, {"input_ids": _ids(16, 256) * mask, "attention_mask": mask}


def window(assets: Path, length: int) -> tuple[nn.Module, Call]:
    """A Mistral-type model of two layers, window 512, eager attention, random weights."""
    config = hf.MistralConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=512,
        max_position_embeddings=max(length, 4096),
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    call = {"input_ids": _ids(1, length, 1000), "use_cache": False, "logits_to_keep": 1}
    return hf.MistralForCausalLM(config), call


def _ids(rows: int, tokens: int, vocabulary: int = 30000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (rows, tokens), generator=generator)


CASES: Mapping[str, Callable[[Path, int], tuple[nn.Module, Call]]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "window": window,
}


def timed(run: Callable[..., Any], call: Call) -> float:
    start = time.perf_counter()
    run(**call)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--only", default="smollm2,minilm,window")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    for name in options.only.split(","):
        model, call = CASES[name](options.assets, options.length)
        model.eval()
        report = rewriter.CompileReport()
        runs: dict[str, Callable[..., Any]] = {
            "eager": model,
            "inductor": torch.compile(model),
            "rewriter": torch.compile(model, backend="rewriter", options={"report": report}),
        }
        table = Table("backend", "first result, s", "run, s", "against inductor")
        with torch.inference_mode():
            first = {key: timed(run, call) for key, run in runs.items()}
            taken: dict[str, list[float]] = {key: [] for key in runs}
            for _ in range(options.rounds):
                for key, run in runs.items():
                    taken[key].append(timed(run, call))
        typical = {key: median(times) for key, times in taken.items()}
        for key in runs:
            ratio = typical["inductor"] / typical[key]
            table.add_row(key, f"{first[key]:.1f}", f"{typical[key]:.2f}", f"{ratio:.2f}x")
        console.print(f"{name}, {options.threads} threads", table)
        for graph in report.graphs:
            console.print(f"own {graph.own_seconds:.1f} s, inner {graph.seconds['inner']:.1f} s")
        console.print(str(report))


if __name__ == "__main__":
    main()
