"""Two processes with sharded parameters train as one process does: the largest difference of loss.

    python examples/fsdp.py --processes 2

A small random Llama is rewritten to the joint window and linear form and distilled in both stages,
everything trained: once in this process, once under `torchrun` by FSDP2 on gloo, and once more with
the sharded run stopped in the middle and resumed. Batches are the same; each process gets its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.distill import Progress, Rows, Silent, distill, parse_config

POLICY = {"rules": [{"use": "hedgehog_window", "options": {"window": 8, "sinks": 2}}]}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
console = Console()


@dataclass
class Curve(Silent):
    """The loss of every step; stops the process after `stop` of them."""

    stop: int | None = None
    losses: list[float] = field(default_factory=list)

    def update(self, progress: Progress) -> None:
        self.losses.append(progress.loss)
        if len(self.losses) == self.stop:
            raise KeyboardInterrupt


def settings(train: str, batch: int, steps: int) -> dict[str, Any]:
    common = {"steps": steps, "batch": batch, "accumulate": 2}
    return {
        "length": 48,
        "dtype": "float32",
        "checkpoint_every": 2,
        "layers": common,
        "logits": {**common, "train": train, "body_lr": 1e-3, "ce": 0.2},
    }


def train(options: argparse.Namespace, folder: Path | None, stop: int | None) -> Curve:
    """One run, in however many processes there are."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    student = rewriter.rewrite(teacher, POLICY, verify="none", force=True)
    ids = torch.randint(0, 97, (16, 48), generator=torch.Generator().manual_seed(1))
    curve = Curve(stop)
    config = parse_config(settings(options.train, options.processes, options.steps))
    try:
        distill(teacher, student, Rows(ids), config, folder=folder, reporter=curve)
    except KeyboardInterrupt:
        return curve
    probe = student(input_ids=ids[:2]).logits
    curve.losses.append(float(probe.detach().float().square().mean()))
    return curve


def in_processes(options: argparse.Namespace, work: Path, stop: int | None) -> list[float]:
    """The loss curve of a run under torchrun, with the mean square of the logits at the end."""
    target = work / "losses.json"
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(options.processes), __file__, "--part", str(work)),
        *("--train", options.train, "--steps", str(options.steps)),
        *("--processes", str(options.processes)),
        *(() if stop is None else ("--stop", str(stop))),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    losses: list[float] = json.loads(target.read_text(encoding="utf-8"))
    return losses


def part(options: argparse.Namespace) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        curve = train(options, options.part / "checkpoints", options.stop)
        if dist.get_rank() == 0:
            text = json.dumps(curve.losses)
            (options.part / "losses.json").write_text(text, encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of each stage")
    parser.add_argument("--train", choices=("core", "lora", "all"), default="all")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        part(options)
        return
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    single = train(options, None, None).losses
    with tempfile.TemporaryDirectory() as folder:
        sharded = in_processes(options, Path(folder), None)
    with tempfile.TemporaryDirectory() as folder:
        before = in_processes(options, Path(folder), options.steps + 4)
        resumed = in_processes(options, Path(folder), None)
    broken = before[: 2 * options.steps + 1 - len(resumed)] + resumed
    for name, other in (("sharded", sharded), ("sharded, stopped and resumed", broken)):
        assert len(other) == len(single), f"{len(other)} losses instead of {len(single)}"
        gaps = [abs(a - b) for a, b in zip(single, other, strict=True)]
        console.print(
            f"train {options.train}, {options.processes} processes, {name}: {len(gaps) - 1} losses "
            f"from {single[0]:.4f} to {single[-2]:.4f}, largest difference {max(gaps[:-1]):.1e}; "
            f"mean square of the logits afterwards {gaps[-1] / single[-1]:.1e} apart"
        )


if __name__ == "__main__":
    main()
