"""Every causal mixer on one real model at one small budget: docs/mixers.md, .json and .svg.

    python examples/mixer_table.py --assets assets

SmolLM2-135M, 22 of its 30 layers rewritten with default options, the 8 others kept where the
shipped hybrid keeps them. Mixers that learn start from data and get some steps of layer-wise
training, the same for all; nothing else is trained. Times are those of one layer's core, processor
time of one thread. Rows are written as they are done, and a run that was stopped goes on where it
was. About a quarter of an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from mixer_table_view import markdown, plot
from rich.console import Console
from torch import nn

import rewriter
from rewriter.atomic import write_file
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.distill import Corpus, distill, packed_corpus, parse_config
from rewriter.distill.copies import core_names, private_copy
from rewriter.distill.data import Rows
from rewriter.distill.fitting import core_gaps, fit_cores
from rewriter.evaluate import SuiteOptions, measure
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State
from rewriter.mixers.base import Mixer
from rewriter.mixers.registry import available
from rewriter.mixers.tokens import Tokens
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import Caches, Target, realise, share_parameters
from rewriter.passes.verify.cores import sample
from rewriter.planner import head_scores

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
KEPT = (0, 7, 14, 15, 18, 19, 20, 23)  # the layers that the policy 'smollm2-hybrid' keeps
LENGTHS = (2048, 8192)
ORIGINAL = "original"
SUITE = SuiteOptions(rows=3, copy_samples=3, metrics=("perplexity", "copy"))
TIMED = 20  # tokens
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
        site = self.sites[1]
        if mixer == ORIGINAL:
            return {**self.quality(self.model), **speed(site, lambda x: softmax(x, site.scale))}
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
        core = student.get_submodule(f"{site.fqn}.core")
        assert isinstance(core, Mixer)
        return {**row, **self.quality(student), **speed(site, lambda x: core.mix(x)[1], core)}

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

    def channel_row(self, mixer: str) -> dict[str, Any]:
        """An MLP block's mixer in the same layers, fitted to text, not trained."""
        ids = self.corpus.train.ids
        layers = [n for n in range(30) if n not in KEPT]
        rule = {"site": "mlp", "layers": layers, "use": mixer}
        calls = [{"input_ids": part} for part in ids[:4].split(4)]
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


def softmax(x: Tokens, scale: float) -> State:
    """The original core and its cache: torch's attention over all keys so far."""
    k, v = x.k, x.v
    if x.state:
        k, v = torch.cat((x.state["k"], k), 2), torch.cat((x.state["v"], v), 2)
    F.scaled_dot_product_attention(x.q, k, v, is_causal=x.count > 1, scale=scale, enable_gqa=True)
    return {"k": k, "v": v}


def speed(
    site: AttentionSite, step: Callable[[Tokens], State | None], core: Mixer | None = None
) -> dict[str, Any]:
    """Seconds of one layer's core for a prompt and for one token behind it, and bytes it keeps."""
    out = {}
    with torch.inference_mode():
        for length in LENGTHS:
            x = sample(site, length + TIMED, batch=1)
            start: State = {}
            if core is not None:
                spec = core.state_spec(site, core.options)
                start = spec.new(site, 1, torch.float32, torch.device("cpu"))
            state: State | None = start
            pieces = [(0, 64), (0, length), *((n, n + 1) for n in range(length, length + TIMED))]
            taken = []
            for low, high in pieces:  # the first one builds kernels
                piece = replace(x.cut(low, high), state=start if low == 0 else state)
                began = time.process_time()
                state = step(piece)
                taken.append(time.process_time() - began)
            assert state is not None
            out[str(length)] = {
                "prefill": taken[1],
                "token": median(taken[2:]),
                "state": sum(t.numel() * t.element_size() for t in state.values()),
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
    parser.add_argument("--steps", type=int, default=12, help="of training, each mixer")
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

    def so_far() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        return found

    for name in options.only or makers:
        if options.only is None and name in so_far()["rows"]:
            continue
        began = time.perf_counter()
        row = makers[name](name)
        done = so_far()
        done["rows"][name] = row
        done |= {"machine": this_machine().describe(), "steps": options.steps}
        write_file(path, (json.dumps(done, indent=1) + "\n").encode())
        console.print(f"{name}: {time.perf_counter() - began:.0f} s {row}")
    done = so_far()
    done["missing"] = [name for name in makers if name not in done["rows"]]
    write_file(options.out / "mixers.md", markdown(done).encode())
    write_file(options.out / "mixers.svg", plot(done))


if __name__ == "__main__":
    main()
