"""How fast does a whole model decode through `generate`? Original and converted, at long contexts.

    python examples/decode_speed.py --assets assets --contexts 4096,8000 --dtype float32

SmolLM2, batch 1, greedy. The context is filled with random tokens, the same for every
model; then rounds of `generate` continue from the filled caches, the models in turn, and the
median time between two tokens is taken. Prints whether all exact models chose the same tokens;
in bfloat16, where near ties fall either way, also how far the logits of each are from those of the
same weights in float32, on the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.passes.step import decoding_of

POLICIES: dict[str, Any] = {
    "exact": "exact",
    "hybrid (8 of 30 full)": "smollm2-hybrid",
    "hedgehog": "hedgehog",
    "sink_window 256+4": "sink-window",
}


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""

    def intervals(self) -> list[float]:
        """Seconds between tokens; the first one may hold a verification and is left out."""
        marks = self.times[1:]
        return [b - a for a, b in pairwise(marks)]


def fill(model: nn.Module, tokens: torch.Tensor, cache: Any) -> None:
    """Put all but the last token into the cache."""
    model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)


def distances(models: dict[str, nn.Module], tokens: torch.Tensor, steps: int) -> dict[str, str]:
    """How far each model decodes from the first one's weights in float32, on given tokens.

    Args:
        tokens: (1, T) int64; the last `steps` of them are fed one by one.
    """
    exact = copy.deepcopy(next(iter(models.values()))).float()
    logits: dict[str, torch.Tensor] = {}
    for name, model in {"float32": exact, **models}.items():
        cache = new_cache(model)
        fill(model, tokens[:, :-steps], cache)
        each = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(tokens.shape[1] - steps - 1, tokens.shape[1])
        ]
        logits[name] = torch.cat(each, dim=1)[0].float()
    wanted = logits.pop("float32")
    return {
        name: f"{float((got - wanted).square().mean().sqrt()):.4f} from float32, "
        f"{int((got.argmax(-1) == wanted.argmax(-1)).sum())} of {steps + 1} tokens its choice"
        for name, got in logits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--contexts", default="4096,8000")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=16, help="tokens of a round")
    parser.add_argument("--only", default="exact", help="begin of the names to time, with commas")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gguf = next((options.assets / "smollm2").glob("*.gguf"))
    source = open_checkpoint(gguf, dtype=options.dtype).model
    models: dict[str, Any] = {"original (SDPA)": source}
    for name, policy in POLICIES.items():
        if name.startswith(tuple(options.only.split(","))):
            models[name] = rewriter.rewrite(source, policy, verify="none")
    contexts = [int(n) for n in options.contexts.split(",")]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 49152, (1, max(contexts)), generator=generator)
    caches = {name: new_cache(model) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    equal: list[bool] = []
    sequence = dict.fromkeys(models, random[:, :0])
    with torch.inference_mode():
        for context in contexts:
            for name, model in models.items():
                more = random[:, : context - sequence[name].shape[1]]
                sequence[name] = torch.cat([sequence[name], more], dim=1)
                filled = caches[name].get_seq_length()
                fill(model, sequence[name][:, filled:], caches[name])
            taken: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(options.rounds):
                for name, model in models.items():
                    clock = Clock()
                    sequence[name] = model.generate(
                        sequence[name],
                        past_key_values=caches[name],
                        max_new_tokens=options.new,
                        min_new_tokens=options.new,
                        do_sample=False,
                        streamer=clock,
                    )
                    taken[name] += clock.intervals()
            for name in models:
                rates[name].append(1 / median(taken[name]))
            exact = [sequence[n] for n in models if n.startswith(("original", "exact"))]
            equal.append(all(torch.equal(exact[0], other) for other in exact))
        apart: dict[str, str] = {}
        if options.dtype == "bfloat16":
            chosen = sequence["original (SDPA)"][:, -contexts[0] - 32 :]
            apart = distances(models, chosen, 32)
    columns = [Column(f"{n:,}", justify="right") for n in contexts]
    table = Table(Column("decoding, tokens/s (ratio)", no_wrap=True), *columns)
    first = rates["original (SDPA)"]
    for name, row in rates.items():
        table.add_row(name, *(f"{r:.1f} ({r / f:.2f}x)" for r, f in zip(row, first, strict=True)))
    table.add_row("exact: same tokens as the original", *("yes" if e else "no" for e in equal))
    console = Console()
    console.print(f"{this_machine().describe()}, {options.dtype}")
    console.print(table)
    for name, model in models.items():
        if name != "original (SDPA)":
            console.print(f"{name} decodes {decoding_of(model)}")
    for name, text in apart.items():
        console.print(f"logits of {name}: {text}")


if __name__ == "__main__":
    main()
