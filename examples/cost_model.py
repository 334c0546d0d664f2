"""Does the cost model predict what is measured? Prefill and decoding of SmolLM2, four mixers.

    python examples/cost_model.py --assets assets

The device is profiled first: products of the model's shapes, pointwise operations, and each core
alone at three lengths. From that and the symbolic arithmetic every time is predicted, before the
model runs; then whole models are measured at six lengths. Batch 1, fp32, one thread, processor time
of this process, medians; a prefill makes the logits of the last token only.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.planner.crossover import between
from rewriter.planner.predict import Use, predict
from rewriter.planner.profiling import ProfileOptions, for_model, profile
from rewriter.planner.trunk import trunk_of

MIXERS: dict[str, dict[str, Any]] = {
    "fused": {},
    "sink_window": {"window": 64, "sinks": 4},
    "hedgehog": {},
    "retnet": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--lengths", default="128,256,512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=2, help="prefills of each length")
    parser.add_argument("--tokens", type=int, default=11, help="decoded tokens at each length")
    parser.add_argument("--out", type=Path, default=Path("out/cost_model.json"))
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    console = Console()
    torch.set_num_threads(1)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    sites = rewriter.inspect(source.model).sites
    trunk = trunk_of(source.model)
    wanted = for_model(
        ProfileOptions(clock="cpu", mixers=tuple(MIXERS.items())), source.model, sites
    )
    began = time.process_time()
    device = profile(wanted)
    console.print(f"{this_machine().describe()}; profiled in {time.process_time() - began:.0f} s")
    predicted: dict[tuple[str, str, int], float] = {}
    for name, given in MIXERS.items():
        uses = [Use(site, name, given) for site in sites]
        for length in lengths:
            for phase in ("prefill", "decode"):
                found = predict(device, trunk, uses, phase, length, compiled_step=True)
                predicted[name, phase, length] = found.seconds
    models = {
        name: rewriter.rewrite(
            source.model, {"rules": [{"use": name, "options": given}]}, verify="none"
        )
        for name, given in MIXERS.items()
    }
    taken: dict[tuple[str, str, int], list[float]] = {key: [] for key in predicted}
    generator = torch.Generator().manual_seed(0)
    caches = {name: new_cache(model) for name, model in models.items()}
    at = 0
    with torch.inference_mode():
        for length in lengths:
            tokens = torch.randint(0, 49152, (1, length), generator=generator)
            for _ in range(options.rounds):
                for name, model in models.items():
                    start = time.process_time()
                    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
                    taken[name, "prefill", length].append(time.process_time() - start)
            chunk = torch.randint(0, 49152, (1, length - options.tokens - at), generator=generator)
            for name, model in models.items():
                for part in chunk.split(512, dim=1):
                    model(input_ids=part, past_key_values=caches[name], use_cache=True,
                          logits_to_keep=1)  # fmt: skip
            for number in range(options.tokens):
                token = torch.randint(0, 49152, (1, 1), generator=generator)
                for name, model in models.items():
                    start = time.process_time()
                    model(input_ids=token, past_key_values=caches[name], use_cache=True)
                    if number > 2:  # the first ones prove the compiled step
                        taken[name, "decode", length].append(time.process_time() - start)
            at = length
            for (name, phase, n), times in taken.items():
                if n == length:
                    ours = predicted[name, phase, n]
                    console.print(
                        f"{n} {phase} {name}: predicted {ours:.4f} s, {median(times):.4f} s"
                    )
    measured = {key: median(times) for key, times in taken.items()}
    errors = {key: predicted[key] / measured[key] - 1 for key in measured}
    columns = [Column(f"{n:,}", justify="right") for n in lengths]
    table = Table(Column("predicted / measured", no_wrap=True), *columns)
    for phase, unit, scale in (("prefill", "s", 1.0), ("decode", "ms", 1e3)):
        for name in MIXERS:
            keys = [(name, phase, n) for n in lengths]
            table.add_row(
                f"{phase}, {name} ({unit})",
                *(f"{predicted[k] * scale:.3g} / {measured[k] * scale:.3g}" for k in keys),
            )
    console.print(table)
    for phase in ("prefill", "decode"):
        part = sorted(abs(e) for key, e in errors.items() if key[1] == phase)
        console.print(f"{phase}: median error {median(part):.1%}, largest {part[-1]:.1%}")
    whole = sorted(map(abs, errors.values()))
    console.print(f"all {len(whole)}: median error {median(whole):.1%}, largest {whole[-1]:.1%}")
    for name in [n for n in MIXERS if n != "fused"]:
        for phase in ("prefill", "decode"):

            def seconds(mixer: str, n: int, phase: Any = phase) -> float:
                uses = [Use(site, mixer, MIXERS[mixer]) for site in sites]
                return predict(device, trunk, uses, phase, n, compiled_step=True).seconds

            def timed(mixer: str, n: int, phase: str = phase) -> float:
                logs = [math.log(measured[mixer, phase, k]) for k in lengths]
                return math.exp(np.interp(math.log(n), np.log(lengths), logs))

            ends = lengths[0], lengths[-1]
            told = between(partial(seconds, "fused"), partial(seconds, name), *ends)
            seen = between(partial(timed, "fused"), partial(timed, name), *ends)
            console.print(
                f"{phase}: {name} is faster than fused from {_length(told)} tokens on as "
                f"predicted, {_length(seen)} as measured"
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"mixer": m, "phase": p, "tokens": n, "predicted": predicted[m, p, n], "measured": t}
        for (m, p, n), t in measured.items()
    ]
    options.out.write_text(
        json.dumps({"device": device.model_dump(mode="json"), "points": rows}, indent=1)
    )


def _length(found: float | None) -> str:
    return "no length" if found is None else f"{found:,.0f}"


if __name__ == "__main__":
    main()
