"""What distillation on a CPU reaches: a hybrid and an all-linear student beside a tuned teacher.

    python examples/hour_of_distillation.py teacher --assets assets
    python examples/hour_of_distillation.py hybrid --assets assets
    python examples/hour_of_distillation.py hybrid --assets assets --window 256 --rows 2
    python examples/hour_of_distillation.py linear --assets assets
    python examples/hour_of_distillation.py page

SmolLM2 is fine-tuned by cross-entropy on rows of plain text, of repeated passages and of hidden
keys. Both students start from the *original* weights: their layers first imitate the original's
(stage 1), then the whole student learns the fine-tuned teacher's distribution (stage 2): the hybrid
on the very rows, in the number of steps and at the rate of the teacher's own tuning, the all-linear
one on shorter rows with more repeats, for half an hour of the clock. Text, repeats and keys that
judge them are never trained on. Each part resumes where it was stopped; the minutes reported are
those of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo import TEXT
from rich.console import Console
from torch import nn

import rewriter
from rewriter.atomic import write_file
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import PlainLines, Progress, Rows, distill, packed_corpus, parse_config
from rewriter.evaluate import SuiteOptions, measure, without_branch

LENGTH = 2048
LENGTHS = {"linear": 1280}  # more and shorter rows: its maps need steps
KINDS = {"linear": "cccctckccc"}  # of ten rows: t plain, c with repeats, k with keys
COPIED = {"linear": 0.65}
ROWS = {"linear": 200}
JUDGED = 1024  # tokens of a row that perplexity is taken from
KEPT = [0, 7, 14, 15, 18, 19, 20, 23]
WHOLE = {"steps": 30, "train": "all", "body_lr": 1.5e-4}
# Layers whose heads look back at single tokens, in the all-linear student: their far field is a
# soft hash. The first eight are KEPT; in 17, 21, 22 and 24 heads of the original weigh the token
# that followed the last time as well.
HASHED = [17, 18, 20, 21, 22, 23]
BITS = 14
LOG_RATIOS = {"hybrid": -4.0, "linear": -3.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "teacher": {"logits": {**WHOLE, "accumulate": 2, "ce": 1.0}},
    "hybrid": {
        "layers": {"steps": 12, "lr": 2e-2},
        "logits": {**WHOLE, "ce": 0.2, "lr": 2e-3},
    },
    "linear": {
        "layers": {
            "steps": 120,
            "lr": 5e-2,
            "output": 0.0,
            "attention": "cross_entropy",
            "attention_queries": 256,
        },
        "logits": {
            "steps": 220,
            "max_seconds": 2400,
            "train": "all",
            "body_lr": 2e-4,
            "ce": 0.1,
            "lr": 5e-3,
        },
    },
}
THINGS = ("pass key", "door code", "ticket number", "locker code", "room number", "file number")
SUBJECTS = ("The farmer", "A teacher", "My neighbour", "The old pilot", "Our cook", "The nurse")
DEEDS = ("paints a fence", "reads the paper", "waits for a train", "mends a net", "counts coins")
PLACES = ("near the mill", "in the garden", "on a hill", "behind the school", "at the market")


def policy_of(name: str, window: int, use: str = "hedgehog_window") -> dict[str, Any]:
    """Which layers get what; anything but a student's name gives the original."""
    options: dict[str, Any] = {"window": window, "sinks": 4}
    if use == "hedgehog_window" and name in LOG_RATIOS:
        options["initial_log_ratio"] = LOG_RATIOS[name]
    hashed = []
    if use == "hedgehog_window":
        cells = {"window": window, "sinks": 4, "initial_log_ratio": 2.0, "bits": BITS}
        hashed = [{"layers": HASHED, "use": use, "options": cells}]
    rules = {
        "hybrid": [{"layers": KEPT, "use": "keep"}, {"use": use, "options": options}],
        "linear": [*hashed, {"use": use, "options": options}],
    }
    return {"rules": rules.get(name, [{"use": "keep"}])}


def mixed_rows(stream: torch.Tensor, tokenizer: Any, count: int, name: str, seed: int = 1) -> Rows:
    """Rows of training text: plain, with repeats and with keys in the shares of `KINDS`."""
    length = LENGTHS.get(name, LENGTH)
    rng = random.Random(seed)
    plain = list(range(stream.numel() // length))
    rng.shuffle(plain)
    rows: list[torch.Tensor] = []
    for index in range(count):
        kind = KINDS.get(name, "tctktctktc")[index % 10]
        if kind == "t":
            at = plain[index % len(plain)] * length
            rows.append(stream[at : at + length])
        elif kind == "c":
            rows.append(repeats(stream, rng, COPIED.get(name, 0.5))[:length])
        else:
            rows.append(torch.tensor(hidden_keys(tokenizer, rng)[:length]))
    return Rows(torch.stack(rows))


def repeats(stream: torch.Tensor, rng: random.Random, share: float) -> torch.Tensor:
    """Pieces of text, about this share of them copies of a piece that stood earlier in the row."""
    pieces: list[torch.Tensor] = []
    total = 0
    while total < LENGTH:
        if len(pieces) > 1 and rng.random() < share:
            pieces.append(pieces[rng.randrange(len(pieces) - 1)])
        else:
            at, size = rng.randrange(stream.numel() - 400), rng.randint(80, 400)
            pieces.append(stream[at : at + size])
        total += pieces[-1].numel()
    return torch.cat(pieces)[:LENGTH]


def hidden_keys(tokenizer: Any, rng: random.Random) -> list[int]:
    """Numbers between idle sentences, each asked for later in the row."""
    ids: list[int] = []
    known: list[tuple[str, str]] = []
    while len(ids) < LENGTH:
        chance = rng.random()
        if chance < 0.08 and len(known) < len(THINGS):
            thing = THINGS[len(known)]
            key = str(rng.randint(10_000, 99_999))
            known.append((thing, key))
            text = f" The {thing} is {key}. Remember it: {key} is the {thing}."
        elif chance < 0.16 and known:
            thing, key = rng.choice(known)
            text = f"\n\nWhat is the {thing}? The {thing} is {key}."
        else:
            text = f" {rng.choice(SUBJECTS)} {rng.choice(DEEDS)} {rng.choice(PLACES)}."
        ids += tokenizer.encode(text, add_special_tokens=False)
    return ids[:LENGTH]


class CpuLines(PlainLines):
    """Progress lines; keeps the processor minutes of all parts of a run beside its checkpoints."""

    def __init__(self, file: Path):
        super().__init__(every=60.0)
        self.file = file
        self.before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0.0

    def update(self, progress: Progress) -> None:
        minutes = self.before + time.process_time() / 60
        write_file(self.file, json.dumps(minutes).encode())
        self.message(f"{minutes:.1f} min {progress.stage} {progress.step} {progress.loss:.4f}")


def label(name: str, options: argparse.Namespace) -> str:
    """Name of a run and of what it writes."""
    window = "" if options.window == 64 else f"-{options.window}"
    rows = "" if options.rows == 1 or name not in LOG_RATIOS else f"-rows{options.rows}"
    return f"{name}{window}{rows}"


def opened(assets: Path, dtype: str) -> Any:
    return open_checkpoint(next((assets / "smollm2").glob("*.gguf")), dtype=dtype)


def train(name: str, options: argparse.Namespace) -> None:
    """One of the three runs, from where it stands to its end."""
    out: Path = options.out / label(name, options)
    out.mkdir(parents=True, exist_ok=True)
    source = opened(options.assets, "float32")
    train_rows = packed_corpus(TEXT, source.tokenizer, JUDGED, 0.1).train
    rows = mixed_rows(train_rows.ids.flatten(), source.tokenizer, ROWS.get(name, 60), name)
    lines = CpuLines(out / "minutes.json")
    student = rewriter.rewrite(source.model, policy_of(name, options.window), verify="none")
    length = LENGTHS.get(name, LENGTH)
    stages = {
        key: {"length": length, "checkpoint_every": 10, "fit": 4 * length, key: value}
        for key, value in CONFIGS[name].items()
    }
    if name in LOG_RATIOS:
        stages["logits"]["logits"] = {**stages["logits"]["logits"], "accumulate": options.rows}
    for key, settings in stages.items():
        teacher = source.model
        if key == "logits" and name != "teacher":
            teacher = rewriter.load(options.out / "teacher" / "model", dtype="float32")
        distill(
            teacher,
            student,
            rows,
            parse_config(settings),
            folder=out / key,
            reporter=lines,
        )
    student.save_pretrained(out / "model")
    judge(name, options, student, source.tokenizer)


def judge(name: str, options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> None:
    """Measure in bfloat16, the precision of training; with and without the linear branch."""
    model = model.to(torch.bfloat16).eval()
    held_out = packed_corpus(TEXT, tokenizer, JUDGED, 0.1).held_out.ids
    suite = SuiteOptions(
        metrics=("perplexity", "copy", "passkey"),
        rows=8,
        copy_samples=6,
        passkey_lengths=(2000,),
        passkey_samples=4,
    )
    few = SuiteOptions(metrics=("perplexity", "copy"), rows=8, copy_samples=6)
    columns = {"whole": measure(model, tokenizer, held_out, options=suite)}
    if name in LOG_RATIOS:
        with without_branch(model, "linear"):
            columns["without linear"] = measure(model, tokenizer, held_out, options=few)
    figures = {
        part: {key: value.to_json() for key, value in column.items()}
        for part, column in columns.items()
    }
    write_file(options.out / f"{label(name, options)}.json", json.dumps(figures, indent=1).encode())
    Console().print(name, figures)


def baseline(name: str, options: argparse.Namespace) -> None:
    """What was there before: the original, or a student's windows alone, both untrained."""
    source = opened(options.assets, "float32")
    model = source.model
    if name != "original":
        policy = policy_of(name.removesuffix("-windows"), options.window, "sink_window")
        model = rewriter.rewrite(model, policy, verify="none")
    judge(name, options, model, source.tokenizer)


TITLES = {
    "original": "original",
    "teacher": "fine-tuned teacher",
    "hybrid-windows": "hybrid: windows alone, untrained",
    "hybrid": "hybrid, distilled",
    "hybrid-256": "hybrid with windows of 256, distilled",
    "hybrid-256-rows2": "the same on all rows of the teacher",
    "linear-windows": "all layers: windows alone, untrained",
    "linear": "all layers, distilled",
}
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def page(name: str, options: argparse.Namespace) -> None:
    """Put the figures that are there into the page, as a table."""
    found = {
        key: json.loads(file.read_text(encoding="utf-8"))
        for key in TITLES
        if (file := options.out / f"{key}.json").exists()
    }
    teacher = found["teacher"]["whole"]["perplexity"]["value"]
    lines = [
        "| model | training, CPU minutes | perplexity | of the tuned teacher | copy perplexity "
        "| pass keys in 2,000 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for key, figures in found.items():
        spent = options.out / key / "minutes.json"
        minutes = f"{float(spent.read_text(encoding='utf-8')):.1f}" if spent.exists() else "none"
        lines.append(row(TITLES[key], minutes, figures["whole"], teacher))
        if "without linear" in figures:
            lines.append(row("its linear branch off", "", figures["without linear"], teacher))
    text = options.page.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
    write_file(options.page, new.encode())


def row(title: str, minutes: str, figures: dict[str, Any], teacher: float) -> str:
    def cell(metric: str) -> str:
        m = figures[metric]
        return f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"

    keys = figures.get("pass key")
    found = "" if keys is None else f"{keys['value'] * keys['samples']:.0f} of {keys['samples']}"
    ratio = figures["perplexity"]["value"] / teacher
    return (
        f"| {title} | {minutes} | {cell('perplexity')} | {ratio:.3f} x "
        f"| {cell('copy perplexity')} | {found} |"
    )


PARTS: dict[str, Callable[[str, argparse.Namespace], None]] = {
    "teacher": train,
    "hybrid": train,
    "linear": train,
    "original": baseline,
    "hybrid-windows": baseline,
    "linear-windows": baseline,
    "page": page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("out/hour"))
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1, help="of a step of a student (teacher: 2)")
    parser.add_argument("--page", type=Path, default=Path("docs/distillation.md"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options.part, options)


if __name__ == "__main__":
    main()
