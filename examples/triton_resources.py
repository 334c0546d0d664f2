"""Compile every shipped Triton kernel for sm_80, sm_90 and gfx942, without a GPU, and tabulate it.

    python examples/triton_resources.py            # write docs/triton_resources.{json,md}
    python examples/triton_resources.py --check    # compare with the committed table

Takes about a quarter of an hour on one core; Triton's own cache makes a second run short.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rewriter.backends.triton.shipped import Row, rows
from rewriter.backends.triton.targets import TARGETS

DOCS = Path(__file__).parents[1] / "docs"
TABLE = DOCS / "triton_resources.json"

INTRODUCTION = """# Resources of the Triton kernels

Read from the machine code of ahead-of-time compiles in bfloat16 (Triton {version}); written by
`examples/triton_resources.py`, compared by the tests. Nothing here was timed on a GPU yet.

Limits of shared memory per program: {limits}. Each cell: registers of a thread, shared memory in
KB, matrix instructions, and the configuration (warps, stages). No kernel spills. `prefix`,
`suffix`, `step` and `merge` multiply no matrices; `invert` multiplies 16 x 16 tiles in float32
without matrix instructions on NVIDIA.

"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    found: dict[str, dict[str, int]] = {}
    problems = []
    every = list(rows())
    for row in every:
        resources = row.resources()
        found[row.key] = asdict(resources)
        problem = row.problem(resources)
        if problem is not None:
            problems.append(f"{row.key}: {problem}")
    for problem in problems:
        sys.stderr.write(problem + "\n")
    if check:
        return int(bool(problems) or found != json.loads(TABLE.read_text()))
    TABLE.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    (DOCS / "triton_resources.md").write_text(page(every, found))
    return int(bool(problems))


def page(every: list[Row], found: dict[str, dict[str, int]]) -> str:
    import triton

    limits = ", ".join(f"{t.name} {t.shared // 1024} KB" for t in TARGETS)
    lines = [INTRODUCTION.format(version=triton.__version__, limits=limits)]
    for dim in sorted({row.dim for row in every}):
        lines.append(f"## Head dim {dim}\n\n")
        lines.append(f"| call | kernel | {' | '.join(t.name for t in TARGETS)} |\n")
        lines.append("|---|---|" + "---|" * len(TARGETS) + "\n")
        named = dict.fromkeys((row.case, row.kernel) for row in every if row.dim == dim)
        for case, kernel in named:
            cells = [cell(found[f"{case}/{dim}/{kernel}/{t.name}"]) for t in TARGETS]
            lines.append(f"| {case} | `{kernel}` | {' | '.join(cells)} |\n")
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def cell(r: dict[str, int]) -> str:
    shared = f"{r['shared'] / 1024:.0f}"
    return f"{r['registers']} · {shared} · {r['matrix']} ({r['warps']}, {r['stages']})"


if __name__ == "__main__":
    sys.exit(main())
