"""Result pages: complete, self-contained, safe against odd names, and the same in Markdown."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from rewriter.cli.main import app
from rewriter.errors import UsageError
from rewriter.pages import render_html, render_markdown, story
from rewriter.pages.charts import svg
from rewriter.pages.content import Chart, Line

HOSTILE = '<script>alert("x")</script> | $a_b$ & "q"'


def decision(index: int, target: str, status: str = "done", reason: str | None = None) -> Any:
    heads = {"query": 9, "key_value": 3, "key_dim": 64, "value_dim": 64}
    return {
        "index": index,
        "fqn": f"layers.{index}.attn",
        "target": target,
        "options": {"window": 64} if target == "sink_window" else {},
        "status": status,
        "tier": "exact" if target == "keep" else "approximate",
        "reason": reason,
        "site": {"heads": heads, "position": "rotary", "spelling": "sdpa"},
    }


def check(outcome: str, measured: Any, subject: str) -> Any:
    return {
        "number": 4,
        "check": "causality",
        "subject": subject,
        "outcome": outcome,
        "measured": measured,
        "bound": 1e-4,
        "detail": "",
    }


REWRITE = {
    "checkpoint": "a model",
    "out": "out",
    "misses": [
        {
            "stage": "match",
            "reason": HOSTILE,
            "source": {"node": "n", "module": "m", "file": "/x/y.py", "line": 7},
        }
    ],
    "plan": {
        "policy": "sink-window",
        "tool": "1",
        "decisions": [
            decision(0, "keep"),
            *(decision(i, "sink_window") for i in range(1, 5)),
            decision(5, "sink_window", "refused", HOSTILE),
        ],
    },
    "contracts": [check("pass", 1e-6, "a"), check("fail", 0.25, "b")],
    "seconds": {"find": 2.0},
}


def measured(value: float, over: float | None = None) -> Any:
    out: dict[str, Any] = {
        "name": "perplexity",
        "value": value,
        "low": value - 1,
        "high": value + 1,
        "samples": 4,
        "tokens": 100,
        "interval": "bootstrap",
        "better": "low",
        "parts": {"tokens 1-10": value + 2, "tokens 11-20": value - 2},
    }
    return out if over is None else {**out, "over_teacher": {"value": over}}


QUALITY = {
    "models": {
        "teacher": {"perplexity": measured(19.0)},
        "student": {"perplexity": measured(20.9, 1.1)},
    },
    "ablation": {"model": "student", "without": {"window": {"perplexity": measured(30.0)}}},
    "notes": ["A note a reader must know."],
}
SEARCH = {
    "budget": 8,
    "unit": "layers",
    "best": {"perplexity": 20.0, "copy_perplexity": 1.5},
    "assignments": [
        {"cost": c, "copy_perplexity": 9.0 / c + d, "perplexity": 20.0}
        for c in (2, 4, 8)
        for d in (0.0, 0.5)
    ],
}
BY_LENGTH = {
    "models": {
        name: {
            "pass key": {
                **measured(0.5),
                "parts": {"256 tokens, depth 0.1": 1.0, "256 tokens, depth 0.9": low}
                | {"512 tokens, depth 0.5": 0.25},
            },
            "associative recall": {**measured(0.5), "parts": {"16 pairs": 1.0, "64 pairs": low}},
            "nested lists": {**measured(0.1), "parts": {"256 tokens": 0.2}},
            "prefill at 512 tokens, ms": measured(10.0),
            "prefill at 2048 tokens, ms": measured(50.0 + low),
        }
        for name, low in {"teacher": 0.75, "student": 0.5}.items()
    }
}
FIGURES = Path(__file__).resolve().parents[2] / "docs" / "kernel_figures.json"


class _Tags(HTMLParser):
    """Checks that tags close in order, and notes what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        for name, value in attrs:
            local = value is None or value.startswith("#")
            if name in ("src", "href", "xlink:href") and not local:
                self.fetched.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> Any:
    figures = json.loads(FIGURES.read_text())[0]
    results = [("k", figures), ("q", QUALITY), ("s", SEARCH), ("r", REWRITE)]
    return story(results, f"Title {HOSTILE}")


def test_the_page_is_whole_fetches_nothing_and_runs_nothing(page: Any) -> None:
    html = render_html(page)
    tags = _Tags()
    tags.feed(html)
    assert tags.open == [] and tags.fetched == []
    assert "script" not in tags.seen and "iframe" not in tags.seen
    assert "@import" not in html and "url(http" not in html
    assert tags.seen.count("svg") >= 7  # by position, the front, one a kernel


def test_both_forms_say_the_same(page: Any) -> None:
    html, text = render_html(page), render_markdown(page)
    for said in (
        "4 of 6 attention blocks were replaced; 1 of 2 checks failed.",
        "sink_window (window 64)",
        "20.9 (19.9 to 21.9), 1.100 x",
        "A note a reader must know.",
        "rewriter convert",
        "y.py:7",
        "0.25",
    ):
        assert said in html and said in text, said
    assert "| 1-4 | sink_window (window 64)" in text
    titles = [s.title for s in page.sections]
    assert titles[0] == "The plan" and titles[-1] == "Kernels on this machine"


def test_charts_over_length() -> None:
    (section,) = story([("e", BY_LENGTH)]).sections
    charts = {x.title: x for x in section.items if isinstance(x, Chart)}
    assert set(charts) == {
        "Pass keys found, by length",
        "Values recalled, by number of pairs",
        "Prefill, by length",
    }
    keys = charts["Pass keys found, by length"].lines
    assert [line.name for line in keys] == ["teacher", "student"]
    assert keys[0].points == ((256.0, 0.875), (512.0, 0.25))
    times = charts["Prefill, by length"].lines[1]
    assert times.points == ((512.0, 10.0), (2048.0, 50.5))
    assert times.spread == ((9.0, 11.0), (49.5, 51.5))
    text = render_markdown(story([("e", BY_LENGTH)]))
    assert "Prefill, by length" in text and "50.5" in text


def test_sensitivities_are_drawn_by_site() -> None:
    def site(index: int) -> Any:
        effect = {"kl": 0.1 * index, "copy": 1.0 + index}
        return {"index": index, "fqn": f"layers.{index}", "swap": {"window": effect}, "restore": {}}

    result = {
        "sites": [site(0), site(1)],
        "everywhere": {"window": {"kl": 0.5, "copy": 3.0}},
        "copy_loss": 0.2,
    }
    (section,) = story([("s", result)]).sections
    charts = [x for x in section.items if isinstance(x, Chart)]
    assert [c.lines[0].points for c in charts] == [
        ((0.0, 1.0), (1.0, 2.0)),
        ((0.0, 0.0), (1.0, 0.1)),
    ]
    text = render_markdown(story([("s", result)]))
    assert "window" in text and "layers.1" in text


def test_gaps_are_drawn_by_site() -> None:
    def gap(site: str, value: float, branch: str = "") -> Any:
        what = f"gap without branch '{branch}'" if branch else "relative teacher gap"
        return {**check("reported", value, site), "number": 9, "check": what, "bound": None}

    contracts = [gap(s, v, b) for s, v in (("a", 0.2), ("b", 0.4)) for b in ("", "window")]
    page = story([("r", {**REWRITE, "contracts": contracts})])
    (section,) = [s for s in page.sections if s.title == "Gap to the original by site"]
    (chart,) = [x for x in section.items if isinstance(x, Chart)]
    assert {line.name: line.points for line in chart.lines} == {
        "whole core": ((1.0, 0.2), (2.0, 0.4)),
        "without 'window'": ((1.0, 0.2), (2.0, 0.4)),
    }


def test_markdown_tables_keep_their_columns(page: Any) -> None:
    widths: list[int] = []
    for line in render_markdown(page).splitlines():
        if not line.startswith("|"):
            widths = []
            continue
        widths.append(len(re.findall(r"(?<!\\)\|", line)))
        assert widths[-1] == widths[0], line


def test_a_chart_follows_the_page() -> None:
    lines = tuple(Line(f"{HOSTILE} {n}", ((1.0, 2.0), (2.0, 3.0 + n))) for n in range(7))
    drawn = svg(Chart(HOSTILE, "x", "y", lines, log_x=True, mark=1.5))
    root = ElementTree.fromstring(drawn)
    assert "width" not in root.attrib and root.attrib["viewBox"]
    assert "var(--ink)" in drawn and "var(--series-5)" in drawn and "#0a01" not in drawn
    assert drawn == svg(Chart(HOSTILE, "x", "y", lines, log_x=True, mark=1.5))


@pytest.mark.parametrize("values", [(12.0, 14.0), (1.0, 80.0), (0.02, 300.0)])
def test_logarithmic_axes_have_plain_numbers(values: tuple[float, float]) -> None:
    line = Line("a", ((512.0, values[0]), (2048.0, values[1])))
    drawn = svg(Chart("t", "x", "y", (line,), log_x=True, log_y=True))
    labels = [x.text or "" for x in ElementTree.fromstring(drawn).iter() if x.tag.endswith("text")]
    assert not any("mathdefault" in label or "$" in label for label in labels)
    assert len([x for x in labels if re.fullmatch(r"[\d.]+", x)]) >= 3


@pytest.mark.parametrize("odd", [{}, {"unknown": 1}, "text"])
def test_an_unknown_result_is_one_clear_sentence(odd: Any) -> None:
    with pytest.raises(UsageError, match="holds no result this page knows"):
        story([("file.json", odd)])


def test_the_command_writes_both_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    given, target = tmp_path / "r.json", tmp_path / "page.html"
    given.write_text(json.dumps(REWRITE))
    args = ["report", str(given), str(target.with_name("missing.json")), "--out", str(target)]
    run = CliRunner().invoke
    assert run(app, args).exit_code == 2 and not target.exists()
    del args[2]
    assert run(app, args).exit_code == 0
    assert target.exists() and target.with_suffix(".md").exists()
    assert run(app, args).exit_code == 6
    assert run(app, [*args, "--overwrite"]).exit_code == 0
    given.write_text("{")
    assert run(app, [*args, "--overwrite"]).exit_code == 2
    assert run(app, [*args[:-1], "page.txt"]).exit_code == 2
