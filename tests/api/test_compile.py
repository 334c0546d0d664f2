"""A rewritten model compiles like any other: one graph, no breaks, the same outputs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, build

import rewriter


@pytest.mark.parametrize(
    "mixer", [pytest.param("sink_window", marks=pytest.mark.nightly), "hedgehog_window"]
)
def test_one_graph_without_breaks(mixer: str) -> None:
    policy = {"rules": [{"use": mixer, "options": {"window": 5, "sinks": 2}}]}
    result = rewriter.rewrite(build("llama"), policy, verify="none")
    ids = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = result(ids, use_cache=False).logits
        got = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
