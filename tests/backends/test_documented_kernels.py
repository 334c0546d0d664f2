"""The code in docs/kernels.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rewriter.backends.schedule import schedule, work

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_examples_of_the_page(monkeypatch):
    monkeypatch.setenv("ATTENTION_REWRITER_BACKENDS", "reference")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (1, 8, 4096, 64)
    assert names["kernel"].backend == "reference"
    for mask in ("strided", "by_head", "table"):
        assert 0 < work(schedule(names[mask], 1024, 1024, 8, 64, 64)).tiles < 8 * 16 * 16


def test_files_the_page_names_exist():
    named = re.findall(r"`((?:rewriter|backends|tests)/[\w/.]+?)/?`", PAGE.read_text())
    assert len(named) > 10
    missing = [n for n in named if not (PAGE.parents[1] / n).exists()]
    assert not missing
