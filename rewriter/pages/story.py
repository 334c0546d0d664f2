"""From the JSON results of commands to a page: each kind of result has its sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewriter.errors import UsageError
from rewriter.pages.content import Page, Section
from rewriter.pages.measured import kernels, quality, searched
from rewriter.pages.rewritten import rewritten
from rewriter.pages.sensed import sensitive

Result = Mapping[str, Any]
_Builder = Callable[[Result], Sequence[Section]]

# The key that only this kind of result has -> its sections, in the order of the page.
_KINDS: tuple[tuple[str, _Builder], ...] = (
    ("decisions", lambda result: rewritten({"plan": result})),
    ("plan", rewritten),
    ("models", quality),
    ("everywhere", sensitive),
    ("assignments", searched),
    ("points", kernels),
)


def story(results: Sequence[tuple[str, Result]], title: str = "Attention rewrite") -> Page:
    """A page from results.

    Args:
        results: (name of the file, its content) as the commands write it with `--json` or `--out`.

    Raises:
        UsageError: a result is of no known kind.
    """
    sections: list[tuple[int, Section]] = []
    for name, result in results:
        rank, builder = _kind(name, result)
        sections += [(rank, section) for section in builder(result)]
    sections.sort(key=lambda pair: pair[0])
    return Page(title, _lead(results), tuple(section for _, section in sections))


def _kind(name: str, result: Result) -> tuple[int, _Builder]:
    if isinstance(result, Mapping):
        for rank, (key, builder) in enumerate(_KINDS):
            if key in result:
                return rank, builder
    raise UsageError(
        f"{name} holds no result this page knows; give what 'rewriter convert --json', "
        "'rewriter eval --json', 'rewriter sensitivity --out', 'rewriter bench --out' or a "
        "search wrote"
    )


def _lead(results: Sequence[tuple[str, Result]]) -> str:
    """One sentence that a reader may take away."""
    parts: list[str] = []
    for _, result in results:
        if "contracts" in result:
            decisions = result["plan"]["decisions"]
            changed = sum(d["status"] != "refused" and d["target"] != "keep" for d in decisions)
            failed = sum(c["outcome"] == "fail" for c in result["contracts"])
            checks = sum(c["outcome"] in ("pass", "fail") for c in result["contracts"])
            parts.append(
                f"{changed} of {len(decisions)} attention blocks were replaced; "
                + (f"{failed} of {checks} checks failed" if failed else f"{checks} checks passed")
            )
    return ". ".join(parts) + "." if parts else ""
