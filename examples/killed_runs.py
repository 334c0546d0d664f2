"""A distillation killed at random moments and resumed ends with the weights of an unbroken run.

    python examples/killed_runs.py --assets assets --kills 10

The demo's hybrid of SmolLM2 is distilled for a few steps of both stages: once without a break, and
once by processes that are killed (SIGKILL) after a random time, each going on where the last one
stopped. Compared are the bytes of every parameter. About three minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from demo import POLICY, TEXT
from rich.console import Console
from safetensors.torch import load_file, save_file

import rewriter
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import Rows, distill, packed_corpus, parse_config

CONFIG = {
    "length": 128,
    "checkpoint_every": 1,
    "layers": {"steps": 12, "batch": 1},
    "logits": {"steps": 12, "batch": 1, "train": "lora"},
}
console = Console()


def attempt(teacher: torch.nn.Module, rows: Rows, folder: Path | None, result: Path) -> None:
    """One process's part: distil from the newest checkpoint, write the result at the end."""
    student = rewriter.rewrite(teacher, str(POLICY), verify="none")
    distill(teacher, student, rows, parse_config(CONFIG), folder=folder)
    save_file({n: p.detach().contiguous() for n, p in student.named_parameters()}, result)


def in_child(*arguments: object, limit: float | None = None) -> bool:
    """Run `attempt` in a process of its own; kill it after `limit` seconds. True if it ended."""
    child = os.fork()
    if child == 0:
        attempt(*arguments)  # type: ignore[arg-type]
        os._exit(0)
    begun = time.monotonic()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if limit is not None and time.monotonic() - begun > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no thread pool
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    rows = packed_corpus(TEXT, source.tokenizer, int(CONFIG["length"]), 0.1).train
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, resumed = folder / "whole.safetensors", folder / "resumed.safetensors"
        begun = time.monotonic()
        in_child(source.model, rows, None, whole)
        seconds = time.monotonic() - begun
        console.print(f"unbroken run: {seconds:.0f} s")
        killed = 0
        while killed < options.kills:
            # Shares of what is left, so that the last kill still finds a run to kill.
            limit = seconds * chance.uniform(0.25, 0.45)
            if in_child(source.model, rows, folder / "work", resumed, limit=limit):
                break
            killed += 1
            newest = sorted(p.name for p in (folder / "work").glob("[!.]*"))
            console.print(f"killed after {limit:.1f} s, newest checkpoint: {newest[-1:] or 'none'}")
        if not resumed.exists():
            in_child(source.model, rows, folder / "work", resumed)
        first, second = load_file(whole), load_file(resumed)
    same = first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    moved = sum(
        not torch.equal(first[n], p.detach())
        for n, p in source.model.named_parameters()
        if n in first
    )
    console.print(
        f"{killed} kills; {len(first)} parameters ({moved} of the original's changed): "
        f"{'bit-equal' if same else 'DIFFERENT'}"
    )
    sys.exit(0 if same and killed == options.kills else 1)


if __name__ == "__main__":
    main()
