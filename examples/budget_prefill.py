"""A budget for prefill at 8,192 tokens: the searched plan against evenly spaced full layers.

    python examples/budget_prefill.py --assets assets

The machine is profiled with SmolLM2's shapes; the search may give each layer a window of 64 with 4
sinks or full attention (with --heads also full attention in one of its three key/value heads), as
long as the predicted prefill stays within the budget. It is compared with evenly spaced full layers
of at least the same predicted cost, on other text and with longer repeats than the search saw:
ratios with 95 % intervals over the same samples. Then all are timed at 8,192 tokens: one thread,
processor time, batch 1, fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console

import rewriter
from rewriter.bench.machine import this_machine
from rewriter.checkpoint import open_checkpoint
from rewriter.cli.show_budget import budget_view
from rewriter.cli.show_quality import quality_view
from rewriter.distill.data import packed_corpus
from rewriter.evaluate import QualityReport, SuiteOptions, measure
from rewriter.evaluate.measurement import ratio
from rewriter.planner.budgeting import plan_under, uniform
from rewriter.planner.profiling import ProfileOptions, for_model, profile
from rewriter.planner.space import SearchSpace

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
NEAR = {"window": 64, "sinks": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--share", default="0.7x", help="of the exact model's prefill time")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--heads", action="store_true", help="also full single heads")
    parser.add_argument("--steps", type=int, default=0, help="of a relaxed start")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="rows of the judgement")
    parser.add_argument("--copies", type=int, default=12, help="repeats of the judgement")
    parser.add_argument("--plan", type=Path, default=Path("out/budget-plan.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    model = source.model
    sites = rewriter.inspect(model).sites
    single = [("duo", {"full": [h], **NEAR}) for h in range(sites[0].heads.key_value)]
    choices = [("sink_window", NEAR), *(single if options.heads else ())]
    shapes = ProfileOptions(
        clock="cpu", mixers=(("fused", {}), *choices), prefill=(1024, options.context), decode=()
    )
    device = profile(for_model(shapes, model, sites))
    console.print(this_machine().describe())
    corpus = packed_corpus(TEXT, source.tokenizer, 1024, 0.15)
    wanted = rewriter.budget(
        latency=options.share,
        context=options.context,
        choices=[{"use": name, "options": given} for name, given in choices],
        steps=options.steps,
        trials=options.trials,
        draws=options.draws,
    )
    began, spent = time.perf_counter(), time.process_time()
    found = plan_under(
        model, sites, wanted, corpus.train.ids.flatten(), device=device, note=console.print
    )
    minutes = [(time.perf_counter() - began) / 60, (time.process_time() - spent) / 60]
    console.print(f"searched {minutes[0]:.1f} minutes, {minutes[1]:.1f} of processor time")
    console.print(*budget_view(found, wanted))
    options.plan.parent.mkdir(parents=True, exist_ok=True)
    found.plan.save(options.plan)
    options.plan.with_name("budget.json").write_text(json.dumps(found.to_json(), indent=1))
    for decision in found.plan.decisions:
        if decision.target != "sink_window":
            console.print(f"layer {decision.index}: {decision.target} {decision.options}")
    space, exact = found.space, (0,) * len(sites)
    picks = found.search.best.picks
    # evenly spaced full layers, one more than the budget pays for, so that they cost no less
    layer = space.costs[0][0] - space.costs[0][1]
    even = uniform(space, space.cost(picks) + layer, 0, 1)
    for name, chosen in (("searched", picks), ("uniform", even)):
        total = found.predicted - found.search.cost + space.cost(chosen)
        console.print(f"{name}: predicted {total:.2f} s of {found.costs.exact:.2f} s exact")
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
    placements = {"exact": exact, "uniform": even, "searched": picks}
    _time(console, space, placements, options.context)


def _time(console: Console, space: SearchSpace, chosen: dict[str, tuple[int, ...]], n: int) -> None:
    """One prefill of each, logits of the last token only."""
    tokens = torch.randint(0, 49152, (1, n), generator=torch.Generator().manual_seed(0))
    seconds = {}
    with torch.inference_mode():
        for name, picks in chosen.items():
            space.use(picks)
            start = time.process_time()
            space.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
            seconds[name] = time.process_time() - start
    for name, taken in seconds.items():
        share = taken / seconds["exact"]
        console.print(f"prefill of {n:,}, {name}: {taken:.1f} s, {share:.2f} of exact")


if __name__ == "__main__":
    main()
