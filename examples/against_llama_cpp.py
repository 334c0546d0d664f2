"""Decoding against llama.cpp: the same 4-bit file, de-quantised here, as it is there.

    python -m venv other && other/bin/pip install llama-cpp-python    # a few minutes
    python examples/against_llama_cpp.py --python other/bin/python --contexts 4096,8000

SmolLM2, batch 1, greedy. Each model's cache is filled with the same random tokens; then rounds of
tokens are decoded in turn, ours through `generate`. Prints the median number of tokens per second.
The hybrid's new parameters are not trained: that changes what it says, not how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decode_speed import POLICIES, Clock, fill
from rich.console import Console
from rich.table import Column, Table

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.passes.step import decoding_of

Round = Callable[[], list[float]]  # seconds between tokens
WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class Theirs:
    """llama.cpp on the quantised file, in a process of its own that waits while ours runs."""

    def __init__(self, python: str, gguf: Path, room: int, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        opened = self._ask(open=str(gguf), room=room, threads=threads)
        self.version = str(opened["version"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fill(self, tokens: list[int]) -> None:
        self._ask(fill=tokens)

    def round(self, new: int) -> list[float]:
        return list(self._ask(round=new)["seconds"])


class Ours:
    """A model of this package through `generate`."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, new_cache(model)
        self.sequence = torch.zeros(1, 0, dtype=torch.long)

    def fill(self, tokens: list[int]) -> None:
        more = torch.tensor(tokens[self.sequence.shape[1] :])[None]
        self.sequence = torch.cat([self.sequence, more], dim=1)
        fill(self.model, self.sequence[:, self.cache.get_seq_length() :], self.cache)

    def round(self, new: int) -> list[float]:
        clock = Clock()
        self.sequence = self.model.generate(
            self.sequence,
            past_key_values=self.cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=clock,
        )
        return clock.intervals()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--contexts", default="4096,8000")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=16, help="tokens of a round")
    parser.add_argument("--only", default="exact,hybrid", help="begin of the names to time")
    parser.add_argument("--python", default=sys.executable, help="one with llama-cpp-python")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gguf = next((options.assets / "smollm2").glob("*.gguf"))
    source = open_checkpoint(gguf, dtype=options.dtype).model
    contexts = [int(n) for n in options.contexts.split(",")]
    theirs = Theirs(options.python, gguf, max(contexts) + 512, options.threads)
    runs: dict[str, Any] = {"llama.cpp": theirs}
    for name, policy in POLICIES.items():
        if name.startswith(tuple(options.only.split(","))):
            runs[name] = Ours(rewriter.rewrite(source, policy, verify="none"))
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(0, 49152, (max(contexts),), generator=generator).tolist()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for context in contexts:
            for run in runs.values():
                run.fill(tokens[:context])
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    taken[name] += run.round(options.new)
            for name in runs:
                rates[name].append(1 / median(taken[name]))
    columns = [Column(f"{n:,}", justify="right") for n in contexts]
    table = Table(Column("decoding, tokens/s (against llama.cpp)", no_wrap=True), *columns)
    first = rates["llama.cpp"]
    for name, row in rates.items():
        table.add_row(name, *(f"{r:.1f} ({r / f:.2f}x)" for r, f in zip(row, first, strict=True)))
    console = Console()
    console.print(
        f"{this_machine().describe()}, {options.dtype}, {gguf.name}, binding {theirs.version}"
    )
    console.print(table)
    for name, run in runs.items():
        if isinstance(run, Ours):
            console.print(f"{name} decodes {decoding_of(run.model)}")


if __name__ == "__main__":
    main()
