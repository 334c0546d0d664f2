"""Every causal mixer on SmolLM2-135M at one equal small budget: a table and a plot.

    python examples/mixer_table.py --assets assets --steps 16 --out mixers.json --plot mixers.svg

22 of 30 layers are rewritten, the same ones each time. For each mixer: the gap of a core to the
original before and after its fit to one batch, the loss of stage 1 at its first and last step,
perplexity and copy perplexity beside the teacher's, the bytes of all states after 2,048 tokens, and
the time of a prefill and of a token behind it. Small budgets rank starts, not mechanisms.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo import TEXT
from rich.console import Console

from rewriter.api import inspect
from rewriter.checkpoint import open_checkpoint
from rewriter.cli.tables import table
from rewriter.distill import distill, packed_corpus, parse_config
from rewriter.distill.fitting import fit_cores
from rewriter.evaluate import copy_perplexity, perplexity
from rewriter.generation import MixerCacheLayer
from rewriter.mixers.registry import available
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Target, realise, share_parameters
from rewriter.passes.realise.cache_probe import new_cache

KEPT = (0, 4, 8, 12, 16, 20, 24, 28)  # layers that keep their attention
OPTIONS: dict[str, dict[str, Any]] = {"duo": {"full": [0]}}
console = Console()


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Least seconds of a few calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def speed(model: Any, length: int) -> tuple[float, float]:
    """Seconds of a prefill of `length` tokens, and of one token behind it."""
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    cache: Any = None

    def prefill() -> None:
        nonlocal cache
        cache = new_cache(model)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        first = timed(prefill, 1)
        step = timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True), 3)
    return first, step


def state_bytes(model: Any, length: int) -> int:
    """Bytes of the caches of all layers after `length` tokens of one sequence."""
    cache = new_cache(model)
    with torch.no_grad():
        model(
            torch.randint(0, model.config.vocab_size, (1, length)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    total = 0
    for layer in cache.layers:
        own = isinstance(layer, MixerCacheLayer)
        tensors = (layer.state or {}).values() if own else (layer.keys, layer.values)
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def judge(model: Any, rows: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    out = {
        "perplexity": perplexity(model, rows[: options.rows]).value,
        "copy": copy_perplexity(model, rows.flatten(), samples=options.passages).value,
        "state_bytes": float(state_bytes(model, min(options.lengths))),
    }
    for length in options.lengths:
        out[f"prefill_{length}"], out[f"token_{length}"] = speed(model, length)
    return out


def row(name: str, source: Any, sites: Any, corpus: Any, options: argparse.Namespace) -> Any:
    teacher = source.model
    targets = [Target(s, name, OPTIONS.get(name, {})) for s in sites]
    student = realise(share_parameters(teacher), targets, examples_for(teacher))
    ids = corpus.train.ids[: options.fit_rows]
    fitted = fit_cores(student, {"input_ids": ids})
    gaps = [sum(g) / len(fitted) for g in zip(*((f.before, f.after) for f in fitted), strict=True)]
    out = {"gap_start": gaps[0], "gap_fitted": gaps[1]}
    learns = any(True for f in fitted for _ in student.get_submodule(f"{f.fqn}.core").parameters())
    if learns and options.steps:
        stages = {"layers": {"steps": options.steps, "lr": options.lr}}
        config = parse_config({"length": options.length, "checkpoint_every": 0, **stages})
        stage = distill(teacher, student, corpus.train, config).stages[0]
        out |= {"loss_first": stage.first, "loss_last": stage.last}
    return out | judge(student, corpus.held_out.ids, options)


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Perplexity against state: what a token of memory buys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric in zip(panels, ("perplexity", "copy"), strict=True):
        for name, values in results.items():
            panel.scatter(values["state_bytes"] / 2**20, values[metric], s=18)
            panel.annotate(name, (values["state_bytes"] / 2**20, values[metric]), fontsize=7)
        panel.set(xscale="log", yscale="log", xlabel="state, MiB", ylabel=metric)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--mixers", nargs="*", help="only these")
    parser.add_argument("--steps", type=int, default=16, help="of stage 1; 0 for none")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a training row")
    parser.add_argument("--fit-rows", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    corpus = packed_corpus(TEXT, source.tokenizer, options.length, 0.1)
    sites = [s for s in inspect(source.model).sites if s.index not in KEPT]
    causal = {n: m for n, m in available().items() if "causal" in m.info.directions}
    chosen = options.mixers or [n for n, m in causal.items() if m.info.tier != "exact"]
    results = {"teacher": judge(source.model, corpus.held_out.ids, options)}
    for name in chosen:
        results[name] = row(name, source, sites, corpus, options)
        console.print(f"{name}: {results[name]}")
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=2), encoding="utf-8")
    columns = list(dict.fromkeys(key for values in results.values() for key in values))
    cells = [
        (name, *(f"{values[c]:.4g}" if c in values else "" for c in columns))
        for name, values in results.items()
    ]
    console.print(table(["mixer", *columns], cells))
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
