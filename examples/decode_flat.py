"""Does decoding stay flat? Time per token and cache bytes from 512 to 8,192 tokens of context.

    python examples/decode_flat.py --assets assets

SmolLM2 with every layer converted, beside the original, batch 1, fp32, interleaved in one process.
The context is filled in chunks of random tokens; then single tokens are timed and the median taken.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.evaluate.speed import cache_bytes
from rewriter.passes.realise.cache_probe import new_cache

LENGTHS = (512, 1024, 2048, 4096, 8192)
POLICIES: dict[str, Any] = {
    "exact": "exact",
    "sink_window 256+4": "sink-window",
    "hedgehog_window 64+4": {"rules": [{"use": "hedgehog_window"}]},
    "hedgehog": "hedgehog",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="timed tokens at each length")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    models = {"original (SDPA)": source.model}
    for name, policy in POLICIES.items():
        models[name] = rewriter.rewrite(source.model, policy, verify="none")
    caches = {name: new_cache(model) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    sizes: dict[str, list[int]] = {name: [] for name in models}
    at = 0
    with torch.inference_mode():
        for length in LENGTHS:
            chunk = torch.randint(0, 49152, (1, length - options.tokens - at), generator=generator)
            for name, model in models.items():
                for part in chunk.split(512, dim=1):
                    model(input_ids=part, past_key_values=caches[name], use_cache=True,
                          logits_to_keep=1)  # fmt: skip
            single: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(options.tokens):
                token = torch.randint(0, 49152, (1, 1), generator=generator)
                for name, model in models.items():
                    start = time.perf_counter()
                    model(input_ids=token, past_key_values=caches[name], use_cache=True)
                    single[name].append(time.perf_counter() - start)
            for name in models:
                times[name].append(median(single[name]) * 1e3)
                sizes[name].append(cache_bytes(caches[name]))
            at = length
    table = Table(Column("model", no_wrap=True), *(f"{n:,}" for n in LENGTHS), "8,192 over 512")
    for name in models:
        row = [f"{t:.1f} ms" for t in times[name]]
        table.add_row(name, *row, f"{times[name][-1] / times[name][0]:.2f}")
    for name in models:
        row = [f"{s / 2**20:.1f} MiB" for s in sizes[name]]
        table.add_row(f"{name}, cache", *row, f"{sizes[name][-1] / sizes[name][0]:.2f}")
    console = Console()
    console.print(f"{this_machine().describe()}, fp32")
    console.print(table)


if __name__ == "__main__":
    main()
