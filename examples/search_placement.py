"""Which layers of SmolLM2 need full attention? Found by the tool, without training.

    python examples/search_placement.py --assets assets

Eight of thirty layers may keep full attention, the others get a window of 64 and 4 sinks. The
search minimises the loss on repeats of text long past, with a limit on the perplexity. It runs in
bfloat16 and measures its best placements again in float32, which decides. The result is judged in
float32 on another part of the text, beside full attention and a uniform placement.
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
from rewriter.cli.show_quality import quality_view
from rewriter.distill.data import packed_corpus
from rewriter.evaluate import QualityReport, SuiteOptions, measure
from rewriter.planner import Candidate, Objective, Probes, SearchOptions, open_space, search

TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--full", type=int, default=8, help="layers that may stay full")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="of a relaxed start")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=12, help="of exchanges, at most")
    parser.add_argument("--limit", type=float, default=1.085, help="perplexity on the probes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", type=Path, default=Path("out/searched-plan.json"))
    parser.add_argument("--journal", type=Path, help="goes on from a search that was stopped")
    parser.add_argument(
        "--compare",
        default="0,7,14,18,19,20,23,24",
        help="full layers of a placement to judge beside the searched one; the default is the one "
        "a person reached from a scan of single layers",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    source = open_checkpoint(next((options.assets / "smollm2").glob("*.gguf")), dtype="float32")
    corpus = packed_corpus(TEXT, source.tokenizer, 1024, 0.1)
    window = {"window": options.window, "sinks": 4}
    sites = rewriter.inspect(source.model).sites
    candidates = [Candidate("sink_window", window), Candidate("keep", {}, 1.0)]
    space = open_space(source.model, sites, candidates)
    fast = open_space(source.model, sites, candidates, dtype=getattr(torch, options.dtype))
    probes = Probes(passage=200, passages=2, gap=(300, 500), skip=20)
    objective = Objective(corpus.train.ids.flatten(), probes, copy_weight=4.0, limit=options.limit)
    chosen = SearchOptions(
        options.steps,
        options.trials,
        options.draws,
        60 * options.minutes,
        finalists=2,
        journal=options.journal,
    )
    began, spent = time.perf_counter(), time.process_time()
    result = search(
        fast,
        objective,
        float(options.full),
        chosen,
        note=console.print,
        precise=space,
    )
    minutes = (time.perf_counter() - began) / 60
    processor = (time.process_time() - spent) / 60
    if result.seconds is not None:
        console.print(
            f"all runs of the journal: {result.seconds / 60:.1f} minutes of processor time"
        )
    options.plan.parent.mkdir(parents=True, exist_ok=True)
    result.plan.save(options.plan)
    figures = options.plan.with_name("search.json")
    figures.write_text(json.dumps(result.to_json("layers with full attention"), indent=1))
    kept = [d.index for d in result.plan.decisions if d.target == "keep"]
    console.print(
        f"{this_machine().describe()}: searched {minutes:.1f} minutes "
        f"({processor:.1f} of processor time on {options.threads} threads), "
        f"{len(result.measured)} assignments measured; full attention at {kept}"
    )
    uniform = [0] * len(space.sites)
    for n in range(options.full):
        uniform[n * len(uniform) // options.full] = 1
    by_hand = [0] * len(space.sites)
    for index in options.compare.split(","):
        by_hand[int(index)] = 1
    suite = SuiteOptions(rows=4, copy_samples=6, metrics=("perplexity", "copy"))
    held_out = corpus.held_out.ids
    columns = {"full attention": measure(source.model, source.tokenizer, held_out, options=suite)}
    placements = {
        "uniform": uniform,
        "compared": by_hand,
        "start": result.start.picks,
        "searched": result.best.picks,
    }
    for name, picks in placements.items():
        space.use(picks)
        columns[name] = measure(space.model, source.tokenizer, held_out, options=suite)
    console.print(*quality_view(QualityReport(columns)))


if __name__ == "__main__":
    main()
