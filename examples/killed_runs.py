"""A distillation killed at random moments and resumed ends with the weights of an unbroken run.

    python examples/killed_runs.py --assets assets --kills 10

The demo's hybrid of SmolLM2 is distilled for a few steps of both stages: once without a break, and
once by processes that are killed (SIGKILL) at a random moment after their first checkpoint, each
going on where the last one stopped. Compared are the bytes of every parameter. About five minutes.
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


def newest(work: Path) -> str:
    """Name of the newest checkpoint, '' if there is none."""
    return max((p.name for p in work.glob("[!.]*")), default="")


def in_child(
    teacher: torch.nn.Module,
    rows: Rows,
    folder: Path | None,
    result: Path,
    delay: float | None = None,
) -> bool:
    """Run `attempt` in a process of its own; True if it ended.

    With a `delay` it is killed so many seconds after it wrote its first checkpoint: wherever it is
    then, in a step or while it writes.
    """
    before = "" if folder is None else newest(folder)
    child = os.fork()
    if child == 0:
        attempt(teacher, rows, folder, result)
        os._exit(0)
    moved: float | None = None
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if delay is not None and folder is not None:
            if moved is None and newest(folder) != before:
                moved = time.monotonic()
            if moved is not None and time.monotonic() - moved > delay:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
        time.sleep(0.005)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--delay", type=float, default=1.5, help="most seconds a process goes on")
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
        killed, work = 0, folder / "work"
        while killed < options.kills:
            delay = chance.uniform(0.0, options.delay)
            if in_child(source.model, rows, work, resumed, delay):
                break
            killed += 1
            console.print(f"killed {delay:.2f} s after a checkpoint; newest: {newest(work)}")
        if not resumed.exists():
            in_child(source.model, rows, work, resumed)
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
