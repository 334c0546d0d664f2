"""Random masks in random spellings: each must be read right, or be called unknown, never wrong.

    python examples/mask_table.py --count 500 --seed 7

Prints what was read wrong, how many were right and unknown, and which kinds are unknown.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from rewriter.passes.fuzz.mask_programs import judge, predicates
from rewriter.passes.fuzz.trace import Tracer


def main() -> int:
    """Run the table; 1 if a mask was read wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--verbose", action="store_true", help="a line for each predicate")
    options = parser.parse_args()
    tracer, answers = Tracer(), Counter[str]()
    for predicate in predicates(options.count, options.seed):
        verdict = judge(predicate, tracer.capture)
        answers[verdict.answer] += 1
        if verdict.answer == "wrong" or options.verbose:
            line = f"{verdict.answer}: {predicate.describe()} -> {verdict.said} {verdict.why}\n"
            sys.stdout.write(line)
    told = ", ".join(f"{answers[a]} {a}" for a in ("right", "opaque", "wrong"))
    sys.stdout.write(f"{options.count} predicates: {told}\n")
    return int(answers["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
