"""How fast is a whole model's prefill? Original and converted, plain and generated kernels.

    python examples/prefill_speed.py --assets assets --lengths 1024,2048,4096,8192

SmolLM2, batch 1, fp32, no cache, logits of the last token only, interleaved in one process. Each
converted model runs twice: on the reference kernels (plain torch) and on the generated ones. The
projections and MLPs stay, so at short lengths no rewrite of attention alone can gain much.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

import rewriter
from rewriter.backends.registry import VARIABLE
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint

POLICIES: dict[str, Any] = {
    "exact": "exact",
    "sink_window 256+4": "sink-window",
    "hedgehog": "hedgehog",
    "hybrid (8 of 30 full)": "smollm2-hybrid",
}


def timed(model: nn.Module, tokens: torch.Tensor, backends: str | None) -> float:
    """Seconds of one prefill with these backends; None for all."""
    if backends is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = backends
    start = time.perf_counter()
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="begin of the names to time, with commas")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    torch.set_num_threads(options.threads)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    runs: dict[str, Callable[[torch.Tensor], float]] = {}

    def add(name: str, model: nn.Module, backends: str | None) -> None:
        runs[name] = lambda tokens: timed(model, tokens, backends)

    add("original (SDPA)", source.model, None)
    wanted = tuple(options.only.split(","))
    for name, policy in POLICIES.items():
        if not name.startswith(wanted):
            continue
        model = rewriter.rewrite(source.model, policy, verify="none")
        if name != "exact":
            add(f"{name}, plain torch", model, "reference")
        add(f"{name}, generated", model, None)

    times: dict[str, list[float]] = {name: [] for name in runs}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for length in lengths:
            tokens = torch.randint(0, 49152, (1, length), generator=generator)
            for run in runs.values():
                run(tokens)
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    taken[name].append(run(tokens))
            for name in runs:
                times[name].append(median(taken[name]))
    columns = [Column(f"{n:,}", justify="right") for n in lengths]
    table = Table(Column("prefill, seconds (speed-up)", no_wrap=True), *columns)
    first = times["original (SDPA)"]
    for name, row in times.items():
        table.add_row(name, *(f"{t:.2f} ({o / t:.2f}x)" for t, o in zip(row, first, strict=True)))
    console = Console()
    console.print(this_machine().describe())
    console.print(table)


if __name__ == "__main__":
    main()
