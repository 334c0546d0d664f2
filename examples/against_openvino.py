"""Prefill against OpenVINO: the original, policy `exact`, OpenVINO from the same exported graph.

    pip install openvino
    python examples/against_openvino.py --assets assets --lengths 4096,8000 --dtype bfloat16

SmolLM2, batch 1, no cache, logits of the last 16 tokens. One module is exported with `torch.export`
for each length; OpenVINO converts that program with its weights as they are and computes in the
dtype asked for. All three run interleaved in one process, on the same number of threads. Prints
medians, ratios, and each one's largest difference from the original's float32 logits, relative to
the largest of them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.timing import interleaved

try:
    import openvino
except ImportError:
    raise SystemExit(
        "this comparison needs OpenVINO, which is no part of this package: pip install openvino"
    ) from None


class Prefill(nn.Module):
    """Token numbers (1, N) to the logits (1, 16, vocabulary) of the last tokens, float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=16).logits
        return logits.float()


def converted(model: nn.Module, ids: Tensor, dtype: str, threads: int) -> Callable[[], Tensor]:
    """OpenVINO's program for one length, from the exported graph of the original."""
    program = torch.export.export(Prefill(model), (ids,), strict=False)
    graph: Any = openvino.convert_model(program, example_input=(ids,))
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request: Any = openvino.Core().compile_model(graph, "CPU", hints).create_infer_request()
    tokens = ids.numpy()
    return lambda: torch.from_numpy(request.infer([tokens])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--lengths", default="4096,8000")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    path = next((options.assets / "smollm2").glob("*.gguf"))
    model = open_checkpoint(path, dtype=options.dtype).model
    exact = rewriter.rewrite(model, "exact", verify="none")
    table = Table(
        *("tokens", "what"),
        *(Column(n, justify="right") for n in ("seconds", "tokens/s", "of OpenVINO", "error")),
    )
    for length in (int(n) for n in options.lengths.split(",")):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (1, length), generator=generator)
        with torch.inference_mode():
            began = time.perf_counter()
            reference = Prefill(model)(ids)
        with torch.no_grad():
            theirs = converted(model, ids, options.dtype, options.threads)
        console.print(f"{length} tokens: converted after {time.perf_counter() - began:.0f} s")
        runs: dict[str, Callable[[], Tensor]] = {
            "original": lambda ids=ids: Prefill(model)(ids),
            "exact": lambda ids=ids: Prefill(exact)(ids),
            "OpenVINO": theirs,
        }
        with torch.inference_mode():
            scale = float(reference.abs().max())
            errors = {n: float((run() - reference).abs().max()) / scale for n, run in runs.items()}
            times = interleaved(
                runs, seconds=0.0, rounds=(options.rounds, options.rounds), warmed=True
            )
        for name in runs:
            took = times[name].median
            ratio = times["OpenVINO"].median / took
            row = (f"{took:.2f}", f"{length / took:.0f}", f"{ratio:.2f} x", f"{errors[name]:.1e}")
            table.add_row(f"{length:,}", name, *row)
    console.print(
        f"{this_machine().describe()}, {options.dtype}, OpenVINO {openvino.get_version()}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
