"""Tokens a second and peak memory of distillation, beside a plain loop over transformers' Trainer.

    python examples/trainer_speed.py --assets assets

The demo's hybrid of SmolLM2 learns the teacher's logits: the same student, the same trained
parameters (new ones and low-rank updates), the same loss (divergence a token) and rows. The plain
loop is a `Trainer` whose `compute_loss` calls both models, once with float32 weights under bfloat16
autocast and once with bfloat16 weights, as published conversion scripts do. Rounds take turns;
medians over steps, the first step of every round left out.

Memory is that of the layer-by-layer stage: what the process grew by over the loaded teacher, as the
allocator keeps freed memory, and in a second process with it given back at once: what is in use.
The bound beside it is the new parameters in float32 with gradient and both moments of the
optimiser, and what the process grows by during forward and backward of one layer alone. The same
steps are then run from activations on disk, one layer after another.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo import POLICY, TEXT
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import rewriter
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import Progress, Rows, Silent, distill, packed_corpus, parse_config
from rewriter.distill.match_layers import MatchLayers
from rewriter.distill.match_logits import MatchLogits

console = Console()
PAGE = os.sysconf("SC_PAGE_SIZE")
GIVEN_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""glibc maps larger blocks each for itself, so they are gone when freed."""


def clock() -> float:
    """Processor time with one thread, which other work on the machine does not change."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass
class Steps(Silent):
    """Seconds between the ends of steps."""

    marks: list[float] = field(default_factory=list)

    def update(self, progress: Progress) -> None:
        self.marks.append(clock())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


@dataclass
class Said(Silent):
    """What a run says."""

    lines: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.lines.append(text)


class Marks(TrainerCallback):
    """The same, of a `Trainer`."""

    def __init__(self) -> None:
        self.steps = Steps()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.marks.append(clock())


class PlainDistillation(Trainer):
    """What people write: both models, softmax of both logits, their divergence."""

    teacher: nn.Module

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        logits = model(**inputs).logits
        loss = F.kl_div(
            F.log_softmax(logits.float(), -1).flatten(0, 1),
            F.log_softmax(target.float(), -1).flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (loss, logits) if kwargs.get("return_outputs") else loss


def plain(
    teacher: nn.Module, student: nn.Module, rows: Rows, options: argparse.Namespace
) -> list[float]:
    """Seconds of each step of the plain loop on private copies made by the caller."""
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            bf16=next(teacher.parameters()).dtype == torch.float32,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        loop = PlainDistillation(
            model=student,
            args=settings,
            train_dataset=[{"input_ids": row} for row in rows.ids],
            callbacks=[marks],
        )
        loop.teacher = teacher
        loop.train()
    return marks.steps.seconds()


def ours(
    teacher: nn.Module, student: nn.Module, rows: Rows, options: argparse.Namespace
) -> list[float]:
    steps = Steps()
    config = parse_config(
        {
            "length": options.length,
            "dtype": "bfloat16",
            "checkpoint_every": 0,
            "logits": {"steps": options.steps, "train": "lora"},
        }
    )
    distill(teacher, student, rows, config, reporter=steps)
    return steps.seconds()


def copies(
    teacher: nn.Module, student: nn.Module, dtype: str, options: argparse.Namespace
) -> tuple[nn.Module, nn.Module]:
    """Teacher and student with low-rank updates, as the stage itself makes them."""
    config = parse_config(
        {"length": options.length, "dtype": dtype, "logits": {"steps": 1, "train": "lora"}}
    )
    stage = MatchLogits(teacher, student, config)
    return stage.teacher, stage.student


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def peak_during(work: Callable[[], object]) -> int:
    """Largest growth of the resident memory while `work` runs, in bytes."""
    before = resident()
    highest = before
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("speed", "memory"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="bfloat16")
    rows = packed_corpus(TEXT, source.tokenizer, options.length, 0.1).train
    student = rewriter.rewrite(source.model, str(POLICY), verify="none")
    if options.only != "memory":
        speed(source.model, student, rows, options)
    if options.only != "speed":
        memory(source.model, student, rows, options)


def speed(teacher: nn.Module, student: nn.Module, rows: Rows, options: argparse.Namespace) -> None:
    contenders: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: ours(teacher, student, rows, options),
    }
    titles = {
        "float32": "Trainer, float32 weights, bfloat16 autocast",
        "bfloat16": "Trainer, bfloat16 weights",
    }
    for dtype, title in titles.items():
        pair = copies(teacher, student, dtype, options)
        contenders[title] = lambda pair=pair: plain(*pair, rows, options)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            seconds[name] += run()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        console.print(
            f"{name}: {options.length / value:.0f} tokens/s "
            f"({value:.2f} s a step of {options.length} tokens, {len(seconds[name])} steps)"
        )
    best = min(value for name, value in medians.items() if name != "ours")
    console.print(f"ours against the faster plain loop: {best / medians['ours']:.2f} x")


def memory(teacher: nn.Module, student: nn.Module, rows: Rows, options: argparse.Namespace) -> None:
    base = {"length": options.length, "dtype": "bfloat16", "checkpoint_every": 0}
    layers = {"steps": options.steps}
    config = parse_config({**base, "layers": layers})
    stored = parse_config({**base, "layers": {**layers, "stored": True}})
    for kind in (config, stored):  # what is compiled and cached once is not counted
        short = kind.layers.model_copy(update={"steps": 2})
        distill(teacher, student, rows, kind.model_copy(update={"layers": short}))
    owned = sum(p.numel() * p.element_size() for p in teacher.parameters())
    console.print(f"loaded teacher: {owned / 2**20:.0f} MiB of weights")
    new, kept = bound(teacher, student, rows, config)
    release()
    held = "given back at once" if GIVEN_BACK.items() <= os.environ.items() else "kept"
    begun = clock()
    grown = peak_during(lambda: distill(teacher, student, rows, config))
    seconds = clock() - begun
    tokens = options.steps * options.length
    console.print(
        f"layer by layer, freed memory {held}: {grown / 2**20:.0f} MiB over the teacher; one "
        f"layer's activations and its optimiser: {(new + kept) / 2**20:.0f} MiB "
        f"({new / 2**20:.0f} of new parameters and their optimiser, {kept / 2**20:.0f} of "
        f"activations); {tokens / seconds:.0f} tokens/s over {options.steps} steps"
    )
    release()
    said = Said()
    begun = clock()
    grown = peak_during(lambda: distill(teacher, student, rows, stored, reporter=said))
    seconds = clock() - begun
    console.print(
        f"from disk, freed memory {held}: {grown / 2**20:.0f} MiB over the teacher; "
        f"{tokens / seconds:.0f} tokens/s ({said.lines[0]})"
    )
    if held == "kept":
        again = [sys.executable, __file__, "--assets", str(options.assets), "--only", "memory"]
        more = ["--length", str(options.length), "--threads", str(options.threads)]
        more += ["--steps", str(options.steps)]
        subprocess.run([*again, *more], env=os.environ | GIVEN_BACK, check=True)


def bound(teacher: nn.Module, student: nn.Module, rows: Rows, config: Any) -> tuple[int, int]:
    """Bytes of all new parameters with their optimiser, and of one layer's activations.

    The largest growth among the layers, each with no free memory to take from.
    """
    stage = MatchLayers(teacher, student, config)
    new = 4 * sum(4 * p.numel() for p in stage.core.values())
    grown: list[int] = []
    learn = stage._learn

    def watched(*args: Any) -> float:
        out: list[float] = []
        release()
        grown.append(peak_during(lambda: out.append(learn(*args))))
        return out[0]

    stage._learn = watched  # type: ignore[method-assign]
    stage.backward(rows.take(torch.tensor([0])), 1.0)
    return new, max(grown)


def release() -> None:
    """Free memory goes back to the system, so that growth into it is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
