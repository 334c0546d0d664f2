"""Graphs that look like attention and are none: each is refused, at a named node, with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rewriter.passes.capture import Captured, capture
from rewriter.passes.match import MatchResult, match

X = torch.randn(2, 12, 64)


class Block(nn.Module):
    """q, k, v of (B, H, N, D) go into `mix`; its result is the output."""

    def __init__(self, mix: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(64, 192), mix
        self.gate = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.mix(q, k, v)


def look(module: nn.Module) -> MatchResult:
    captured = capture(module, (X,))
    assert isinstance(captured, Captured), captured
    return match(captured)


def good(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT / 4, -2) @ v


def softmax_over_heads(q, k, v):
    return torch.softmax(q @ k.mT / 4, 1) @ v


def double_softmax(q, k, v):
    return torch.softmax(torch.softmax(q @ k.mT / 4, -1), -1) @ v


def mask_after_softmax(q, k, v):
    n = q.shape[-2]
    return (torch.softmax(q @ k.mT / 4, -1) * torch.ones(n, n).tril()) @ v


def values_from_probabilities(q, k, v):
    p = torch.softmax(q @ k.mT / 4, -1)
    return p @ (p @ v)


def two_products(q, k, v):
    return torch.softmax(q @ k.mT / 4 + k @ v.mT, -1) @ v


def data_dependent_temperature(q, k, v):
    return torch.softmax((q @ k.mT) * q.mean(-1, keepdim=True), -1) @ v


def probabilities_squared(q, k, v):
    p = torch.softmax(q @ k.mT / 4, -1)
    return p @ p


def no_values(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1)


WRONG = {
    softmax_over_queries: "values are summed over another axis than the softmax runs over",
    softmax_over_heads: "axis that queries and keys share",
    double_softmax: "'softmax' stands between",
    mask_after_softmax: "'mul' stands between the softmax and any product with values",
    values_from_probabilities: "probabilities",
    two_products: "two products are added before the softmax",
    data_dependent_temperature: "scaled by something that is no constant",
    probabilities_squared: "multiplied with themselves",
    no_values: "not followed by a product with values",
}


def test_the_right_graph_is_found():
    result = look(Block(good))
    assert len(result.matches) == 1
    assert not result.misses


@pytest.mark.parametrize("mix", WRONG, ids=lambda f: f.__name__)
def test_wrong_graphs_are_refused(mix):
    result = look(Block(mix))
    assert not result.matches
    assert any(WRONG[mix] in m.reason for m in result.misses), [m.reason for m in result.misses]


@pytest.mark.parametrize("mix", WRONG, ids=lambda f: f.__name__)
def test_refusals_name_the_source_line(mix):
    _, first = inspect.getsourcelines(mix)
    lines = range(first, first + len(inspect.getsourcelines(mix)[0]))
    for miss in look(Block(mix)).misses:
        assert miss.source.file == __file__
        forward = inspect.getsourcelines(Block.forward)
        own = range(forward[1], forward[1] + len(forward[0]))
        assert miss.source.line in lines or miss.source.line in own


class Pooling(nn.Module):
    """A learned weighted mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.score(x).transpose(1, 2), -1) @ x


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk(torch.softmax(self.gate(x), -1), 2)
        return weights + chosen


@pytest.mark.parametrize("module", [Pooling(), Router()], ids=["pooling", "router"])
def test_a_softmax_over_a_projection_is_no_attention(module):
    result = look(module)
    assert not result.matches
    assert [m.reason for m in result.misses] == [
        "the softmax follows a projection, not a product of queries and keys"
    ]


class LearnedBias(nn.Module):
    """A bias table that is still zero."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = Block(self._mix), nn.Parameter(torch.zeros(4, 12, 12))

    def _mix(self, q, k, v):
        return torch.softmax(q @ k.mT / 4 + self.table, -1) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def test_a_zero_bias_that_can_be_trained_is_a_bias():
    (found,) = look(LearnedBias()).matches
    assert found.site.terms == ("bias",)


def test_a_batch_of_one_is_understood():
    captured = capture(Block(good), (X[:1],))
    assert isinstance(captured, Captured)
    (found,) = match(captured).matches
    assert found.site.heads.query == 4
