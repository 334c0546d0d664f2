"""Fitting evaluated masks: any mask of the algebra is recovered, nothing else is accepted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.ir.mask import Mask
from rewriter.passes.match.bias import classify
from rewriter.passes.match.mask import (
    Evaluated,
    fit,
    lengths_to_probe,
    positions_to_sample,
    split_additive,
)


def brute(kind: str, size: int, i: int, j: int) -> bool:
    """The definition, one pair at a time."""
    return {
        "full": True,
        "causal": j <= i,
        "window": j <= i and i - j < size,
        "symmetric": abs(i - j) <= size,
        "chunk": i // size == j // size,
        "causal chunk": j <= i and i // size == j // size,
        "one sided": i - j < size,
        "sinks": j <= i and (i - j < size or j < 3),
        "dilated": (i - j) % size == 0,
        "strided": j <= i and (i - j < 4 or (i - j) % size == 0),
        "prefix": j <= i or j < size,
        "block causal": j // size <= i // size,
    }[kind]


def evaluated(kind: str, size: int, length: int) -> Evaluated:
    rows = [[brute(kind, size, i, j) for j in range(length)] for i in range(length)]
    return Evaluated.dense(torch.tensor(rows))


KINDS = [
    *("full", "causal", "window", "symmetric", "chunk", "causal chunk", "one sided"),
    *("sinks", "dilated", "strided", "prefix", "block causal"),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 20))
def test_recovers_every_mask_of_the_algebra(kind, size):
    lengths = lengths_to_probe([size], 300)
    mask = fit([evaluated(kind, size, n) for n in lengths], [size])
    assert mask is not None
    for n in (1, size - 1, size, size + 1, 3 * size + 5):
        steps = torch.arange(n)
        assert torch.equal(mask.dense(steps, steps), evaluated(kind, size, n).allowed)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20))
def test_window_needs_no_constant_from_the_graph(size):
    mask = fit([evaluated("window", size, 26)])
    assert mask is not None
    assert mask.describe() == f"causal & window({size})"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 25), st.integers(0, 25))
def test_one_wrong_pair_is_never_accepted(i, j):
    wrong = evaluated("causal", 1, 26)
    wrong.allowed[i, j] ^= True
    assert fit([evaluated("causal", 1, 11), wrong]) is None


@settings(max_examples=12, deadline=None)
@given(st.integers(301, 9000), st.sampled_from(["causal", "window", "symmetric"]))
def test_large_sizes_are_told_apart_at_sampled_positions(size, kind):
    positions = positions_to_sample([size])
    rows = [[brute(kind, size, int(i), int(j)) for j in positions] for i in positions]
    sampled = Evaluated(torch.tensor(rows), positions, positions)
    mask = fit([evaluated(kind, size, 11), sampled], [size])
    wanted = {
        "causal": "causal",
        "window": f"causal & window({size})",
        "symmetric": f"symmetric_window({size})",
    }
    assert mask is not None
    assert mask.describe() == wanted[kind]


def test_split_additive_knows_every_hiding_value():
    least = torch.finfo(torch.float32).min
    allowed, finite = split_additive(torch.tensor([0.0, -1e4, least, -torch.inf, -2.5]))
    assert allowed.tolist() == [True, False, False, False, True]
    assert finite.tolist() == [0.0, 0.0, 0.0, 0.0, -2.5]


@pytest.fixture
def seen() -> torch.Tensor:
    return torch.ones(1, 9, 9, dtype=torch.bool).tril()


def test_alibi_up_to_a_constant_per_query(seen):
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    j, i = torch.arange(9.0)[None, None, :], torch.arange(9.0)[None, :, None]
    assert classify(slopes * (j - i), seen) == "alibi"
    assert classify((slopes * j).expand(2, 9, 9), seen) == "alibi"
    assert classify((slopes * j).bfloat16().float().expand(2, 9, 9), seen) == "alibi"


def test_relative_dense_and_absent_biases(seen):
    table = torch.randn(2, 17)
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :] + 8
    assert classify(table[:, distance], seen) == "relative"
    assert classify(torch.randn(2, 9, 9), seen) == "dense"
    assert classify(torch.zeros(2, 9, 9), seen) == "none"


def test_full_is_the_empty_mask():
    assert fit([evaluated("full", 1, 11)]) == Mask()


def test_one_length_reaches_behind_blocks_of_blocks() -> None:
    assert max(lengths_to_probe([6], 300)) > 6 * 6 + 6
    assert max(lengths_to_probe([4, 9], 300)) > 9 * 9 + 9
    assert max(lengths_to_probe([140], 300)) == 2 * 140 + 3
