"""A budget for prefill at 8,192 tokens: the searched plan against the same mixers evenly spread.

    python examples/budget_prefill.py --assets assets --share 0.5x

The machine is profiled with SmolLM2's shapes. The search may give each layer full attention, a
window of 64 with 4 sinks, or no attention at all, which saves the projections too, as long as the
predicted prefill stays within the budget. The uniform placement has each of them as often, evenly
spread, so it costs the same. Both are judged on other text and with longer repeats than the search
saw: ratios with 95 % intervals over the same samples. Then both plans are carried out with all else
that `exact` does, and timed beside `exact` at 8,192 tokens: one thread, processor time, batch 1.

bfloat16 by default: there attention has a larger share of the time than in float32, so a budget
reaches further. A search that was stopped goes on from its journal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import rewriter
from rewriter.api import make_plan_for
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.cli.show_budget import budget_view
from rewriter.cli.show_quality import quality_view
from rewriter.distill.data import packed_corpus
from rewriter.evaluate import QualityReport, SuiteOptions, measure
from rewriter.evaluate.measurement import ratio
from rewriter.planner.budgeting import plan_under, uniform
from rewriter.planner.device import Device
from rewriter.planner.profiling import ProfileOptions, for_model, profile
from rewriter.planner.search import plan_of

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
CHOICES = (("sink_window", {"window": 64, "sinks": 4}), ("drop", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--share", default="0.5x", help="of the exact model's prefill time")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="rows of the judgement")
    parser.add_argument("--copies", type=int, default=12, help="repeats of the judgement")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--out", type=Path, default=Path("out/budget"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype=options.dtype)
    model = source.model
    sites = rewriter.inspect(model).sites
    console.print(this_machine().describe())
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "device.json"
    if kept.is_file():
        device = Device.load(str(kept))
    else:
        shapes = ProfileOptions(
            clock="cpu",
            dtype=options.dtype,
            mixers=(("fused", {}), *CHOICES),
            prefill=(1024, options.context),
            decode=(),
        )
        device = profile(for_model(shapes, model, sites))
        device.save(kept)
    corpus = packed_corpus(TEXT, source.tokenizer, 1024, 0.15)
    wanted = rewriter.budget(
        latency=options.share,
        context=options.context,
        dtype=options.dtype,
        choices=[{"use": name, "options": given} for name, given in CHOICES],
        trials=options.trials,
        draws=options.draws,
    )
    exact_plan, _ = make_plan_for(model, "exact")
    taken = _timed({"exact": rewriter.rewrite(model, exact_plan, verify="none")}, options)["exact"]
    console.print(f"prefill of {options.context:,}, exact: {taken:.2f} s")
    spent = time.process_time()
    found = plan_under(
        model,
        sites,
        wanted,
        corpus.train.ids.flatten(),
        device=device,
        exact_seconds=taken,
        journal=options.out / f"{options.dtype}.jsonl",
        note=console.print,
    )
    console.print(f"searched: {(time.process_time() - spent) / 60:.1f} minutes of processor time")
    console.print(*budget_view(found, wanted))
    found.plan.save(options.out / "plan.json")
    (options.out / "budget.json").write_text(json.dumps(found.to_json(), indent=1))
    space, picks = found.space, found.search.best.picks
    even = uniform(picks)
    exact = (0,) * len(sites)
    for name, chosen in (("searched", picks), ("uniform", even)):
        total = found.predicted - found.search.cost + space.cost(chosen)
        names = [space.candidates[n][p].mixer for n, p in enumerate(chosen)]
        where = {m: [n for n, x in enumerate(names) if x == m] for m in Counter(names)}
        console.print(
            f"{name}: predicted {total:.2f} s, {total / found.costs.exact:.2f} of exact; {where}"
        )
    suite = SuiteOptions(
        rows=options.rows, copy_samples=options.copies, metrics=("perplexity", "copy")
    )
    columns = {}
    for name, chosen in (("exact", exact), ("uniform", even), ("searched", picks)):
        space.use(chosen)
        columns[name] = measure(space.model, source.tokenizer, corpus.held_out.ids, options=suite)
    console.print(*quality_view(QualityReport(columns)))
    for metric, measured in columns["searched"].items():
        against = ratio(measured, columns["uniform"][metric])
        console.print(f"{metric}, searched / uniform: {against.describe()}")
    plans = {"uniform": plan_of(space, even), "searched": plan_of(space, picks)}
    made = {"exact": exact_plan} | {
        name: exact_plan.model_copy(update={"decisions": plan.decisions})
        for name, plan in plans.items()
    }
    models = {name: rewriter.rewrite(model, plan, verify="none") for name, plan in made.items()}
    seconds = _timed(models, options)
    for name, taken in seconds.items():
        share = taken / seconds["exact"]
        console.print(
            f"prefill of {options.context:,}, {name}: {taken:.2f} s, {share:.2f} of exact"
        )


def _timed(models: dict[str, nn.Module], options: argparse.Namespace) -> dict[str, float]:
    """Prefills in turn, logits of the last token only; medians of processor time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49152, (1, options.context), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(options.rounds + 1):
            for name, one in models.items():
                start = time.process_time()
                one(input_ids=tokens, use_cache=False, logits_to_keep=1)
                if turn:  # the first one traces and compiles
                    seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
