"""What the lossless policy `exact` gains end to end: prefill, padded batches, windows.

    python examples/exact_speed.py --assets assets --only encoder,prefill --lengths 1024,4096

Each row runs the original and the rewritten model interleaved in one process and prints medians,
their ratio and the largest difference of the outputs (at real tokens), relative to the largest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.timing import interleaved

Run = Callable[[nn.Module], Tensor]


def ids(*shape: int) -> Tensor:
    return torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))


def encoder(assets: Path, dtype: str) -> tuple[nn.Module, dict[str, Run]]:
    """MiniLM, mean of the real tokens of 16 rows of 16 to 256 tokens."""
    model = open_checkpoint(assets / "minilm", dtype=dtype).model
    lengths = torch.linspace(16, 256, 16).long()
    mask = (torch.arange(256) < lengths[:, None]).long()
    tokens = ids(16, 256)

    def run(model: nn.Module) -> Tensor:
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return model, {"16 rows of 16 to 256 tokens": run}


def causal(model: nn.Module, lengths: list[int]) -> dict[str, Run]:
    def prefill(tokens: Tensor) -> Run:
        return lambda m: m(input_ids=tokens, use_cache=False, logits_to_keep=16).logits.float()

    return {f"prefill of {n:,} tokens": prefill(ids(1, n)) for n in lengths}


def window(dtype: str) -> nn.Module:
    """A Mistral of 4 layers with random weights, window 512, eager attention."""
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=512,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return MistralForCausalLM(config).to(getattr(torch, dtype)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--only", default="encoder,prefill,window")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--lengths", default="4096,8000")
    parser.add_argument(
        "--precision", default="highest", choices=("highest", "high"),
        help="torch.set_float32_matmul_precision, of both models",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    lengths = [int(n) for n in options.lengths.split(",")]
    table = Table(
        *("model", "run"),
        *(Column(n, justify="right") for n in ("stock", "exact", "ratio", "error")),
    )
    for name in options.only.split(","):
        if name == "encoder":
            model, runs = encoder(options.assets, options.dtype)
        elif name == "window":
            model = window(options.dtype)
            runs = causal(model, lengths)
        else:
            path = next((options.assets / "smollm2").glob("*.gguf"))
            model = open_checkpoint(path, dtype=options.dtype).model
            runs = causal(model, lengths)
        exact = rewriter.rewrite(model, "exact", verify="none")
        for what, run in runs.items():
            with torch.inference_mode():
                wanted, got = run(model), run(exact)
                error = float((got - wanted).abs().max() / wanted.abs().max())
                times = interleaved(
                    {"stock": lambda r=run, m=model: r(m), "exact": lambda r=run, m=exact: r(m)},
                    seconds=0.0,
                    rounds=(options.rounds, options.rounds),
                    warmed=True,
                )
            stock, ours = times["stock"].median, times["exact"].median
            row = (f"{stock:.2f} s", f"{ours:.2f} s", f"{stock / ours:.2f} x", f"{error:.1e}")
            table.add_row(f"{name}, {options.dtype}", what, *row)
    console = Console()
    console.print(this_machine().describe())
    console.print(table)


if __name__ == "__main__":
    main()
