"""How few tokens are computed: the decision is measured once, kept, and changes no result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from recurrence_cases import call_of

from rewriter.backends.cpu import recurrence as cpu
from rewriter.backends.cpu import recurrence_forms as forms
from rewriter.backends.cpu.build import NoKernel, find_compiler
from rewriter.backends.inputs import RecurrenceInputs
from rewriter.ir.recurrence import Recurrence
from rewriter.timing import Timing

TOKEN = Recurrence(16, 16, decay="token", normaliser="ones")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((1, 1, 1, 1), 48), ((9, 1, 1, 1), 8), ((1, 1, 3.9, 1), 24), ((1, 3, 5, 6), 24)],
)
def test_the_limit_is_where_chunks_become_faster(
    steps: tuple[float, ...],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ATTENTION_REWRITER_CACHE", str(tmp_path))
    calls: list[int] = []

    def timed(contenders: Mapping[str, object], **options: object) -> dict[str, Timing]:
        at = len(calls)
        calls.append(at)
        return {"step": Timing(steps[at], 0, 1), "chunk": Timing(4.0, 0, 1)}

    def nothing(x: RecurrenceInputs) -> None:
        return None

    monkeypatch.setattr(forms, "interleaved", timed)
    for spec in (TOKEN, TOKEN):  # the second time it is read
        assert forms.limit(spec, torch.float32, "code", nothing, nothing) == expected
    assert len(calls) == len(forms.LENGTHS)
    [file] = (tmp_path / "measured").iterdir()
    assert len(json.loads(file.read_text())) == 1
    calls.clear()
    forms.limit(TOKEN, torch.float32, "other code", nothing, nothing)
    assert len(calls) == len(forms.LENGTHS)


@pytest.mark.skipif(isinstance(find_compiler(), NoKernel), reason="no C++ compiler")
def test_both_forms_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TOKEN, 30, state=True)
    assert call.state is not None
    x = RecurrenceInputs(call.q, call.k, call.v, **call.keywords(), start=call.state["S"])
    results = []
    for limit in (8, 48):
        monkeypatch.setattr(cpu, "_steps", lambda *_, limit=limit: limit)
        results.append(cpu.forward(TOKEN, x))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    for mine, theirs in zip(cpu.forward(TOKEN, x), results[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
