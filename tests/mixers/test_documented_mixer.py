"""The mixer of docs/extending.md keeps the contracts: the page is run, not trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixer_sites import make_site

from rewriter.passes.verify.cores import check_core

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_the_documented_mixer_keeps_every_core_contract() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    assert len(code.group(1).splitlines()) < 80
    scope: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code.group(1), str(PAGE), "exec"), scope)
    mixer = scope["RunningMean"]
    core = mixer(make_site(), mixer.Options())
    results = list(check_core(core, "the documented mixer"))
    expected = {"head map", "one function, many schedules"}
    assert expected <= {r.title for r in results}
    assert [r.check for r in results if r.outcome == "fail"] == []
