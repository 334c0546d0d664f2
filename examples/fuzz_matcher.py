"""Throw random spellings of attention at the matcher, and programs that only look like it.

    python examples/fuzz_matcher.py --count 2000 --seed 12
    python examples/fuzz_matcher.py --count 200 --seed 7 --only broken

Every program is first compared numerically with the canonical program of the same specification.
Failures are printed as the smallest list of edits that still fails.
"""

from __future__ import annotations

import argparse
import sys
import time

from rewriter.passes.fuzz import campaign
from rewriter.passes.fuzz.trace import Tracer

KINDS = {
    "equivalent": ("found with equal facts", campaign.equivalent),
    "broken": ("refused or described truthfully", campaign.broken),
}


def main() -> int:
    """Run the campaigns; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="programs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(KINDS))
    options = parser.parse_args()
    tracer, failed = Tracer(), False
    for name, (meaning, recipes) in KINDS.items():
        if options.only not in (None, name):
            continue
        start = time.perf_counter()
        outcome = campaign.run(recipes(options.count, options.seed), tracer.capture)
        seconds = time.perf_counter() - start
        say(f"{name}: {outcome.describe()} {meaning}; {seconds / options.count:.2f} s each")
        for failure in outcome.failures:
            failed = True
            say(failure.recipe.describe())
            say(f"  -> {failure.verdict.answer}: {failure.verdict.why}")
    return int(failed)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
