"""The results of `mixer_contracts.py` as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rewriter.ir.contract import CONTRACTS

Result = Mapping[str, Any]
NUMBERS = range(1, 11)
ABSENT = {
    2: "no heads",
    3: "no cache: every token is seen at once",
    8: "not of the exact tier",
    9: "exact",
    10: "no attention core is timed",
}


def markdown(done: Mapping[str, Any]) -> str:
    """The page."""
    rows: Mapping[str, Any] = done["rows"]
    lines = [
        "# The contracts and oracles of the mixers",
        "",
        "Six layers of SmolLM2-135M rewritten (two for MLP mixers), or all six of MiniLM",
        "(bidirectional), verified in full as every rewrite is, then saved, loaded and compared.",
        "Made by `examples/mixer_contracts.py`.",
        "",
        f"Machine: {done['machine']}.",
        "",
        "`n` : n checks passed. gap: |core - original| / |original| before any training. A length:",
        "the first of 256, 1,024 and 4,096 tokens at which the core overtakes torch's attention.",
        "",
        "| mixer | " + " | ".join(f"{n}" for n in NUMBERS) + " |",
        "|---|" + "---|" * len(NUMBERS),
    ]
    notes: dict[str, list[str]] = {}
    for name, row in rows.items():
        cells = [_cell(name, n, row["results"], notes) for n in NUMBERS]
        lines.append(f"| {_name(name)} | " + " | ".join(cells) + " |")
    if done["missing"]:
        names = "; ".join(map(_name, done["missing"]))
        lines += ["", f"Not run yet: {names}. Running the script again adds them."]
    lines += ["", *(f"{n}. {CONTRACTS[n]}" for n in NUMBERS), ""]
    lines += ["Not applicable, or one check of several that is not:", ""]
    lines += [f"- {note}: {'; '.join(map(_name, names))}" for note, names in notes.items()]
    if "oracles" in done:
        lines += _oracles(done["oracles"])
    return "\n".join([*lines, *_lines(done["lines"])]) + "\n"


def _name(name: str) -> str:
    mixer, comma, rest = name.partition(",")
    return f"`{mixer}`{comma}{rest}"


def _cell(name: str, number: int, results: Sequence[Result], notes: dict[str, list[str]]) -> str:
    mine = [r for r in results if r["number"] == number]
    failed = [r for r in mine if r["outcome"] == "fail"]
    if failed:
        return "**FAIL** " + "; ".join(r["check"] for r in failed)
    for r in (r for r in mine if r["outcome"] == "not applicable"):
        why = r["detail"].replace(name.partition(",")[0], "the mixer")
        notes.setdefault(f"{number}, {r['check']} ({why})", []).append(name)
    told = [r for r in mine if r["outcome"] == "reported" and r["measured"] is not None]
    passed = [r for r in mine if r["outcome"] == "pass"]
    if number == 9 and told:
        gaps = [r["measured"] for r in told if "gap" in r["check"]]
        return f"gap {mean(gaps):.2f}"
    if number == 10 and told:
        length = told[0]["measured"]
        return "none" if length == float("inf") else f"{length:.0f}"
    if passed:
        return f"`{sum(r['count'] for r in passed)}`"
    if not mine:
        notes.setdefault(f"{number} ({ABSENT.get(number, 'no such check')})", []).append(name)
    return "-"


def _oracles(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "",
        "## Against their oracles",
        "",
        "Largest error over all cases, relative to the largest value; bounds: 1e-5 for outputs,",
        "1e-4 for gradients, fp32.",
        "",
        "| mixer | oracle | outputs | gradients | cases |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(errors):
        row = errors[name]
        gradients = f"{row['gradients']:.1e}" if "gradients" in row else ""
        lines.append(
            f"| `{name}` | {ORACLES.get(name, '')} | {row['outputs']:.1e} | {gradients} "
            f"| {row['outputs cases']:.0f} |"
        )
    return lines


ORACLES = {
    "gla": "fla-core's naive recurrence",
    "retnet": "fla-core's naive retention",
    "rwkv7": "fla-core's naive DPLR recurrence",
    "gated_deltanet": "the layer of Qwen3-Next in transformers",
    "mamba2": "the layer of Mamba-2 in transformers",
    "hydra": "the published quasiseparable matrix, entry by entry in float64",
    "s4d": "scipy.signal's state spaces; its matrix in float64",
    "sigmoid_attention": "the published formula in float64",
    "sink_window": "torch's attention with a mask",
    "duo": "torch's attention with a mask for each head",
    "razor": "softmax over keys and their means in float64",
    "moba": "the published rule, query by query, and torch's attention",
    "linear_shortcut": "torch.linalg.lstsq in float64",
    "drop": "zero",
    "lowrank_mlp": "the product of its factors; error of the truncated SVD (Eckart-Young)",
    "monarch_mlp": "its entry formula; the SVD of every slice",
}


def _lines(files: Mapping[str, int]) -> list[str]:
    most = max(files, key=lambda n: files[n])
    return [
        "",
        "## Size",
        "",
        f"{len(files)} files define a mixer, {mean(files.values()):.0f} lines on average with",
        f"documentation; the longest is `{most}`, {files[most]}. None contains kernel code: each",
        "states a kernel spec and asks the registry for code.",
    ]
