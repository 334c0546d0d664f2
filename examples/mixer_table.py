"""Every causal mixer on one real model at one small budget: docs/mixers.md, .json and .svg.

    python examples/mixer_table.py --assets assets

SmolLM2-135M, 22 of its 30 layers rewritten with default options, the 8 others kept where the
shipped hybrid keeps them. Mixers that learn start from data and get some steps of layer-wise
training, the same for all; nothing else is trained. One thread; times are processor time. Rows are
written as they are done, and a run that was stopped goes on where it was. Under an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from decode_flat import cache_bytes
from mixer_table_view import markdown, plot
from rich.console import Console
from torch import nn

import rewriter
from rewriter.atomic import write_file
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import Corpus, distill, packed_corpus, parse_config
from rewriter.distill.copies import core_names
from rewriter.distill.data import Rows
from rewriter.distill.fitting import core_gaps, fit_cores
from rewriter.evaluate import SuiteOptions, measure
from rewriter.ir.site import AttentionSite
from rewriter.mixers.registry import available
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Caches, Target, realise, share_parameters
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.planner import head_scores

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
KEPT = (0, 7, 14, 15, 18, 19, 20, 23)  # the layers that the policy 'smollm2-hybrid' keeps
LENGTHS = (2048, 8192)
ORIGINAL = "original"
SUITE = SuiteOptions(rows=3, copy_samples=3, metrics=("perplexity", "copy"))
TIMED = 12  # tokens
console = Console()


@dataclass
class Bench:
    """What all rows share."""

    model: nn.Module
    tokenizer: Any
    corpus: Corpus
    steps: int
    caches: Caches = field(default_factory=dict)

    def student(self, mixer: str) -> nn.Module:
        """The model with one mixer in all layers that are not kept."""
        targets = [
            Target(site, mixer, self.options(mixer, site.fqn))
            for site in self.sites
            if site.index not in KEPT
        ]
        copy = share_parameters(self.model)
        return realise(copy, targets, examples_for(self.model), self.caches).eval()

    @cached_property
    def sites(self) -> Sequence[AttentionSite]:
        return rewriter.inspect(self.model).sites

    @cached_property
    def retrieval_heads(self) -> dict[str, tuple[int, ...]]:
        """Of all 30 layers, on random text that is repeated."""
        return head_scores(self.model, self.sites).chosen()

    def options(self, mixer: str, fqn: str) -> dict[str, Any]:
        """The defaults, but for the heads that are measured to retrieve."""
        return {"full": self.retrieval_heads[fqn]} if mixer in ("duo", "razor") else {}

    def row(self, mixer: str) -> dict[str, Any]:
        """Everything about one mixer."""
        if mixer == ORIGINAL:
            return {**self.quality(self.model), **speed(self.model)}
        student = self.student(mixer)
        held_out = Rows(self.corpus.held_out.ids[:2])
        info = available()[mixer].info
        row: dict[str, Any] = {"tier": info.tier, "gap_start": gap(student, held_out)}
        if mixer in ("duo", "razor"):
            row["full"] = {fqn: h for fqn, h in self.retrieval_heads.items() if h}
        if core_names(student):
            if fit_cores(student, self.corpus.train.take(torch.arange(4))):
                row["gap_fitted"] = gap(student, held_out)
            self.train(student)
            row["gap_distilled"] = gap(student, held_out)
        return {**row, **self.quality(student), **speed(student)}

    def train(self, student: nn.Module) -> None:
        config = {
            "length": self.corpus.train.ids.shape[1],
            "checkpoint_every": 0,
            "fit": 0,
            "layers": {"steps": self.steps},
        }
        distill(self.model, student, self.corpus.train, parse_config(config))

    def quality(self, model: nn.Module) -> dict[str, float]:
        """On rows of 1,024 tokens that were not trained on."""
        rows = self.corpus.held_out.ids.flatten()
        rows = rows[: len(rows) // 1024 * 1024].view(-1, 1024)
        return {
            name.replace(" ", "_"): m.value
            for name, m in measure(model, self.tokenizer, rows, options=SUITE).items()
        }

    def channel_row(self, mixer: str) -> dict[str, Any]:
        """An MLP block's mixer in the same layers, fitted to text, not trained."""
        ids = self.corpus.train.ids
        layers = [n for n in range(30) if n not in KEPT]
        rule = {"site": "mlp", "layers": layers, "use": mixer}
        calls = [{"input_ids": part} for part in ids[:16].split(4)]
        student = rewriter.rewrite(
            self.model, {"rules": [rule]}, verify="none", calibration=calls
        ).eval()
        names = [f"model.layers.{n}.mlp" for n in layers]
        sizes = [sum(p.numel() for p in m.parameters()) for m in (student, self.model)]
        return {
            "gap_start": mlp_gap(self.model, student, names, self.corpus.held_out.ids[:2]),
            "parameters": sizes[0] / sizes[1],
            **self.quality(student),
        }


def gap(student: nn.Module, rows: Rows) -> float:
    """Mean over the rewritten layers of |core - original| / |original|."""
    return mean(core_gaps(student, rows).values())


def mlp_gap(model: nn.Module, student: nn.Module, names: list[str], ids: torch.Tensor) -> float:
    """Mean of |block - original| / |original| of modules, each on the original's stream."""
    gaps: list[float] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: torch.Tensor) -> None:
            error = student.get_submodule(name)(*args) - output
            gaps.append(float(error.norm() / output.norm()))

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_of(n)) for n in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return mean(gaps)


def speed(model: nn.Module) -> dict[str, Any]:
    """Seconds of prefill and of one token, and bytes of the cache, at each of `LENGTHS`.

    The text is filled in pieces of 2,048 tokens; prefill is the time of all pieces so far.
    """
    generator = torch.Generator().manual_seed(0)
    cache, spent, at, out = new_cache(model), 0.0, 0, {}

    def call(count: int) -> float:
        ids = torch.randint(0, 49152, (1, count), generator=generator)
        began = time.process_time()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.process_time() - began

    with torch.inference_mode():
        model(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)  # kernels are built
        for length in LENGTHS:
            while at < length:
                count = min(2048, length - at)
                spent += call(count)
                at += count
            steps = [call(1) for _ in range(TIMED)]
            at += TIMED
            out[str(length)] = {
                "prefill": spent,
                "token": median(steps),
                "cache": cache_bytes(cache),
            }
    return {"speed": out}


def causal_mixers() -> list[str]:
    """Names of all mixers that change a causal layer."""
    infos = [m.info for m in available().values()]
    return [i.name for i in infos if "causal" in i.directions and i.tier != "exact"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, default=32, help="of training, each mixer")
    parser.add_argument("--only", nargs="*", help="rows to make, also again; the rest stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    corpus = packed_corpus(TEXT, source.tokenizer, 512, 0.1)
    bench = Bench(source.model.eval(), source.tokenizer, corpus, options.steps)
    makers: Mapping[str, Callable[[str], dict[str, Any]]] = {
        **dict.fromkeys([ORIGINAL, *causal_mixers()], bench.row),
        **dict.fromkeys(["lowrank_mlp", "monarch_mlp"], bench.channel_row),
    }
    path = options.out / "mixers.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    wanted = options.only or [name for name in makers if name not in done["rows"]]
    for name in wanted:
        began = time.perf_counter()
        done["rows"][name] = makers[name](name)
        done |= {"machine": this_machine().describe(), "steps": options.steps}
        write_file(path, (json.dumps(done, indent=1) + "\n").encode())
        console.print(f"{name}: {time.perf_counter() - began:.0f} s {done['rows'][name]}")
    write_file(options.out / "mixers.md", markdown(done).encode())
    write_file(options.out / "mixers.svg", plot(done))


if __name__ == "__main__":
    main()
