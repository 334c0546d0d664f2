"""Every causal mixer on one real model at one small budget: docs/mixers.md, .json and .svg.

    python examples/mixer_table.py --assets assets

SmolLM2-135M, 22 of its 30 layers rewritten with default options, the 8 others kept where the
shipped hybrid keeps them. Mixers that learn start from data and get some steps of layer-wise
training, the same for all; nothing else is trained. Times are those of one layer's core, processor
time of one thread. Rows are written as they are done, and a run that was stopped goes on where it
was. About half an hour on a core; `--only-times` measures the times of all rows anew, alone, which
takes about three minutes and wants an idle machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from mixer_table_view import markdown, plot
from mixer_times import block_times, core_times, softmax_times
from rich.console import Console
from torch import nn

import rewriter
from rewriter.atomic import write_file
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import Corpus, distill, packed_corpus, parse_config
from rewriter.distill.copies import core_names, learning_owners, private_copy, rewritten_owners
from rewriter.distill.fitting import fit_cores
from rewriter.evaluate import SuiteOptions, measure
from rewriter.ir.site import AttentionSite
from rewriter.mixers.channel.registry import get as get_channel
from rewriter.mixers.registry import available
from rewriter.passes.compare import first_tensor
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Caches, Target, realise, share_parameters
from rewriter.planner import head_scores

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
KEPT = (0, 7, 14, 15, 18, 19, 20, 23)  # the layers that the policy 'smollm2-hybrid' keeps
ORIGINAL = "original"
SUITE = SuiteOptions(rows=3, copy_samples=3, metrics=("perplexity", "copy"))
CHANNEL = ("lowrank_mlp", "monarch_mlp")
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
            Target(site, mixer, self.options(mixer, site.index))
            for site in self.sites
            if site.index not in KEPT
        ]
        copy = share_parameters(self.model)
        return realise(copy, targets, examples_for(self.model), self.caches).eval()

    @cached_property
    def sites(self) -> Sequence[AttentionSite]:
        return rewriter.inspect(self.model).sites

    @cached_property
    def retrieval_heads(self) -> dict[int, tuple[int, ...]]:
        """Of all 30 layers, on random text that is repeated."""
        return head_scores(self.model, self.sites).chosen()

    def options(self, mixer: str, layer: int) -> dict[str, Any]:
        """The defaults, but for the heads that are measured to retrieve."""
        return {"full": self.retrieval_heads[layer]} if mixer in ("duo", "razor") else {}

    def row(self, mixer: str) -> dict[str, Any]:
        """Everything about one mixer but times."""
        if mixer == ORIGINAL:
            return self.quality(self.model)
        if mixer in CHANNEL:
            return self.channel_row(mixer)
        student = self.student(mixer)
        row: dict[str, Any] = {"tier": available()[mixer].info.tier, "gap_start": self.gap(student)}
        if mixer in ("duo", "razor"):
            row["full"] = {n: h for n, h in self.retrieval_heads.items() if h}
        if core_names(student):
            if fit_cores(student, self.corpus.train.take(torch.arange(4))):
                row["gap_fitted"] = self.gap(student)
            self.train(student)
            row["gap_distilled"] = self.gap(student)
        return {**row, **self.quality(student)}

    def channel_row(self, mixer: str) -> dict[str, Any]:
        """An MLP block's mixer in the same layers, fitted to text, with the same training."""
        layers = [n for n in range(30) if n not in KEPT]
        rule = {"site": "mlp", "layers": layers, "use": mixer}
        calls = [{"input_ids": part} for part in self.corpus.train.ids[:4].split(4)]
        student = rewriter.rewrite(
            self.model, {"rules": [rule]}, verify="none", calibration=calls
        ).eval()
        row = {"tier": get_channel(mixer).info.tier, "gap_fitted": self.gap(student)}
        sizes = [sum(p.numel() for p in m.parameters()) for m in (student, self.model)]
        row |= {"parameters": sizes[0], "saved": sizes[1] - sizes[0]}
        self.train(student)
        return {**row, "gap_distilled": self.gap(student), **self.quality(student)}

    def gap(self, student: nn.Module) -> float:
        """Mean over the rewritten blocks of |output - original| / |original|, on the original's
        stream of held-out text."""
        names = [*rewritten_owners(student)] or [*learning_owners(student)]
        return block_gap(self.model, student, names, self.corpus.held_out.ids[:2])

    def times(self, mixer: str) -> dict[str, Any]:
        """Of one layer's core or block."""
        site = self.sites[1]
        if mixer == ORIGINAL:
            block = self.model.get_submodule("model.layers.1.mlp")
            return {**softmax_times(site), "block": block_times(block, site.hidden_dim)}
        if mixer in CHANNEL:
            rule = {"site": "mlp", "layers": [1], "use": mixer}
            student = rewriter.rewrite(self.model, {"rules": [rule]}, verify="none")
            return block_times(student.get_submodule("model.layers.1.mlp"), site.hidden_dim)
        return core_times(site, mixer, {"full": ()} if mixer in ("duo", "razor") else {})

    def train(self, student: nn.Module) -> None:
        config = {
            "length": self.corpus.train.ids.shape[1],
            "checkpoint_every": 0,
            "fit": 0,
            "layers": {"steps": self.steps},
        }
        distill(self.model, student, self.corpus.train, parse_config(config))

    def quality(self, model: nn.Module) -> dict[str, float]:
        """On rows of 1,024 tokens that were not trained on, in bfloat16."""
        model = private_copy(model, torch.bfloat16, {})
        rows = self.corpus.held_out.ids.flatten()
        rows = rows[: len(rows) // 1024 * 1024].view(-1, 1024)
        return {
            name.replace(" ", "_"): m.value
            for name, m in measure(model, self.tokenizer, rows, options=SUITE).items()
        }


def block_gap(model: nn.Module, student: nn.Module, names: list[str], ids: torch.Tensor) -> float:
    """Mean of |block - original| / |original| of modules, each on the original's stream."""
    gaps: list[float] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            mine, wanted = (
                first_tensor(x) for x in (student.get_submodule(name)(*args, **kwargs), output)
            )
            gaps.append(float((mine - wanted).norm() / wanted.norm()))

        return hook

    handles = [
        model.get_submodule(n).register_forward_hook(hook_of(n), with_kwargs=True) for n in names
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return mean(gaps)


def causal_mixers() -> list[str]:
    """Names of all mixers that change a causal layer."""
    infos = [m.info for m in available().values()]
    return [i.name for i in infos if "causal" in i.directions and i.tier != "exact"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, default=12, help="of training, each mixer")
    parser.add_argument("--only-times", action="store_true", help="of the rows there are")
    parser.add_argument("--only", nargs="*", help="rows to make, also again; the rest stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    corpus = packed_corpus(TEXT, source.tokenizer, 512, 0.1)
    bench = Bench(source.model.eval(), source.tokenizer, corpus, options.steps)
    names = [ORIGINAL, *causal_mixers(), *CHANNEL]
    path = options.out / "mixers.json"

    def so_far() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        return found

    for name in options.only or names:
        row = so_far()["rows"].get(name, {})
        if options.only is None and not options.only_times and "speed" in row:
            continue
        began = time.perf_counter()
        if not options.only_times:
            row = bench.row(name)
        done = so_far()
        done["rows"][name] = row | bench.times(name)
        done |= {"machine": this_machine().describe(), "steps": options.steps}
        write_file(path, (json.dumps(done, indent=1) + "\n").encode())
        console.print(f"{name}: {time.perf_counter() - began:.0f} s {done['rows'][name]}")
    done = so_far()
    done["missing"] = [name for name in names if name not in done["rows"]]
    write_file(options.out / "mixers.md", markdown(done).encode())
    write_file(options.out / "mixers.svg", plot(done))


if __name__ == "__main__":
    main()
