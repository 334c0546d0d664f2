"""Every family of the zoo: exactly its MLP blocks, each with the right activation."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from zoo import FAMILIES
from zoo.mlps import MLPS

from rewriter.passes.capture import Captured, capture
from rewriter.passes.match.mlp import MlpResult, match_mlps

DAILY = ("phi3", "gpt-oss", "albert", "clip-text", "moonshine", "gpt2")
"""Families that are spelled unlike each other; the others run nightly."""


@cache
def found(name: str) -> MlpResult:
    family = FAMILIES[name]
    torch.manual_seed(0)
    module = family.build(family.implementations[0]).eval()
    captured = capture(module, (), family.inputs())
    if not isinstance(captured, Captured):
        pytest.xfail(f"the family cannot be captured: {captured.reason}")
    return match_mlps(captured)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DAILY else [pytest.mark.nightly]) for n in FAMILIES],
)
def test_exactly_the_blocks_of_the_family(name):
    expected = MLPS.get(name, ())
    result = found(name)
    sites = [m.site for m in result.matches]
    assert [s.down.weight for s in sites] == [e.down for e in expected]
    for site, says in zip(sites, expected, strict=True):
        assert site.activation.name == says.activation
        assert site.activation.scale == 1.0
        assert (site.kind, site.hidden) == (says.kind, says.hidden)
    assert not result.misses
