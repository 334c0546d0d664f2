"""Associative recall: small models trained from scratch, one mixer each.

    python examples/mqar.py --mixers gated_deltanet gla retnet --steps 500 --out mqar.json

A row shows key-value pairs once and then asks for some of them again; the answer to a key is the
value that followed it. Two layers of one mixer without an MLP, learned positions, vocabulary 256,
64 tokens, 4 pairs, width 64: small enough for a CPU, hard enough that a fixed decay falls behind.
Accuracy is over the queried positions of rows never trained on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
from rewriter.mixers.registry import get

VOCABULARY, WIDTH, HEADS = 256, 64, 2
console = Console()


def rows(count: int, tokens: int, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, tokens) inputs and labels, -100 where nothing is asked.

    The pairs come first; each key is asked once more at a gap that favours short ones.
    """
    generator = torch.Generator().manual_seed(seed)
    half = VOCABULARY // 2
    keys = torch.stack(
        [torch.randperm(half - 1, generator=generator)[:pairs] + 1 for _ in range(count)]
    )
    values = torch.randint(half, VOCABULARY, (count, pairs), generator=generator)
    inputs = torch.zeros(count, tokens, dtype=torch.long)
    labels = torch.full((count, tokens), -100)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    places = (tokens - 2 * pairs) // 2
    weight = torch.arange(1, places + 1).double().pow(0.01 - 1).expand(count, -1)
    gaps = torch.multinomial(weight, pairs, generator=generator)
    at = 2 * pairs + 2 * gaps
    inputs.scatter_(1, at, keys)
    labels.scatter_(1, at, values)
    return inputs, labels


class Layer(nn.Module):
    """Pre-norm projections around one mixer core."""

    def __init__(self, mixer: str) -> None:
        super().__init__()
        width = WIDTH // HEADS
        site = AttentionSite(
            fqn="layer",
            index=0,
            heads=HeadGroups(HEADS, HEADS, width, width),
            score=(Scale(width**-0.5),),
            terms=(),
            mask=Mask((Causal(),)),
            spelling="sdpa",
            source=Source("mqar"),
            causal_flag=True,
            hidden_dim=WIDTH,
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.core = get(mixer)(site, get(mixer).Options())
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        parts = self.project(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.core(*parts.unbind(0), hidden=hidden)[0]
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Recall(nn.Module):
    """Embeddings, layers, tied readout. `mixers` is one name a layer."""

    def __init__(self, mixers: list[str], tokens: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(tokens, WIDTH)
        self.layers = nn.Sequential(*(Layer(m) for m in mixers))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return F.linear(self.norm(self.layers(x)), self.words.weight)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        asked = labels >= 0
        return float((model(inputs).argmax(-1)[asked] == labels[asked]).float().mean())


def train(mixers: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Accuracy after training, and every 100 steps before."""
    torch.manual_seed(options.seed)
    model = Recall(mixers, options.tokens)
    data = rows(options.examples, options.tokens, options.pairs, options.seed)
    test = rows(1000, options.tokens, options.pairs, options.seed + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    history = {}
    for step in range(1, options.steps + 1):
        chosen = torch.randint(0, options.examples, (64,))
        logits = model(data[0][chosen])
        loss = F.cross_entropy(logits.flatten(0, 1), data[1][chosen].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps:
            history[str(step)] = accuracy(model, *test)
            console.print(f"{'+'.join(mixers)} step {step}: {history[str(step)]:.3f}")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mixers", nargs="+", default=["keep", "gated_deltanet", "gla", "mamba2", "retnet"]
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--examples", type=int, default=20000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.mixers:
        layers = name.split("+") if "+" in name else [name, name]
        results[name] = train(layers, options)
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
