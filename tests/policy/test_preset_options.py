"""The shipped policies against the real mixers."""

from __future__ import annotations

import sys

import pytest
from policy_stubs import make_site

from rewriter.policy import Policy, make_plan, preset_names


@pytest.mark.parametrize("name", sorted({*preset_names()} - {"retrieval-heads"}))
def test_presets_fit_the_registered_mixers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rewriter.mixers.registry", raising=False)
    causal = name != "encoder-hybrid"
    plan = make_plan(Policy.load(name), [make_site(i, causal=causal) for i in range(30)])
    assert {d.status for d in plan.decisions} == {"planned"}
    kept = sum(d.target == "keep" for d in plan.decisions)
    expected = {"identity": 30, "hybrid": 8, "smollm2-hybrid": 8, "encoder-hybrid": 10}
    expected |= {"five-to-one": 5, "one-in-eight": 4}
    assert kept == expected.get(name, 0)
