"""Conditions over (h, i, j): values on tensors against plain arithmetic, refusals, tables."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import sympy
import torch
from mask_cases import drawn, named
from sympy import ITE, And, Eq, Equivalent, Implies, Mod, Not, Or, ceiling

from rewriter.ir.lookup import lookup
from rewriter.ir.mask import VALID, B, H, I, J, Mask, WindowOrSinks, evaluate
from rewriter.ir.predicate import lower

N, HEADS = 45, 3
h, i, j = np.ogrid[:HEADS, :N, :N]


def values(mask) -> np.ndarray:
    seen = evaluate(mask, *(torch.from_numpy(x) for x in (i, j, h)))
    assert seen.dtype == torch.bool
    return seen.expand(HEADS, N, N).numpy()


@pytest.mark.parametrize("case", named(N), ids=lambda c: c.name)
def test_every_mask_of_the_catalogue_can_be_evaluated(case):
    expected = np.broadcast_to(case.plain(h, i, j), (HEADS, N, N))
    assert np.array_equal(values(case.mask), expected)


def test_random_compositions():
    rng = random.Random(5)
    for _ in range(200):
        case = drawn(rng, N)
        expected = np.broadcast_to(case.plain(h, i, j), (HEADS, N, N))
        assert np.array_equal(values(case.mask), expected), case.name


@pytest.mark.parametrize(
    ("mask", "plain"),
    [
        (Eq(Mod(J - I, 4), 1), (j - i) % 4 == 1),
        (ceiling((I - 7) / 4) <= J, -((7 - i) // 4) <= j),
        ((I + H) // 3 < J / 2, (i + h) // 3 * 2 < j),
        (Implies(J > 3, I > 9), (j <= 3) | (i > 9)),
        (Equivalent(I > 9, J > 9, H > 1), ((i > 9) == (j > 9)) & ((j > 9) == (h > 1))),
        (ITE(H > 1, J <= I, J < 3), np.where(h > 1, j <= i, j < 3)),
        (Eq(J <= I, J <= 2 * I, evaluate=False), (j <= i) == (j <= 2 * i)),
        (sympy.Xor(I > 5, J > 5, H > 0), (i > 5) ^ (j > 5) ^ (h > 0)),
        ((I - 20) ** 2 + (J - 20) ** 2 < 90, (i - 20) ** 2 + (j - 20) ** 2 < 90),
        (sympy.Max(I - 5, 0, J - 9) >= sympy.Min(J, 12), None),
    ],
)
def test_connectives_and_arithmetic(mask, plain):
    if plain is None:
        plain = np.maximum(np.maximum(i - 5, 0), j - 9) >= np.minimum(j, 12)
    assert np.array_equal(values(mask), np.broadcast_to(plain, (HEADS, N, N)))


def test_a_table_is_false_outside():
    table = np.ones((2, 3), dtype=bool)
    seen = values(lookup(table, I - 1, J // 2))
    assert np.array_equal(seen[0], (i[0] >= 1) & (i[0] <= 2) & (j[0] < 6))
    assert np.array_equal(values(Not(lookup(table, I - 1, J // 2))), ~seen)


def test_tables_compose_and_travel():
    one = lookup(np.eye(4, dtype=bool), I // 3, J // 3)
    assert And(one, one) == one
    assert Or(one, J <= I).has(type(one))
    again = pickle.loads(pickle.dumps(one))
    assert again == one and hash(again) == hash(one)
    assert one.subs(I, I + 1) == lookup(np.eye(4, dtype=bool), (I + 1) // 3, J // 3)


def test_a_table_needs_one_index_for_each_axis():
    with pytest.raises(ValueError, match="2 axes"):
        lookup(np.ones((2, 2), dtype=bool), I)


@pytest.mark.parametrize("mask", [Eq(VALID(B, J), 1), J < B])
def test_a_batch_row_is_refused(mask):
    with pytest.raises(ValueError, match="key_lengths"):
        lower(mask)


@pytest.mark.parametrize(
    "mask", [sympy.sin(I) < J, I % J < 2, sympy.floor(I / J) < 2, sympy.Symbol("x") < J]
)
def test_other_functions_are_refused(mask):
    with pytest.raises(ValueError, match="cannot evaluate"):
        lower(mask)


def test_a_head_must_be_given():
    with pytest.raises(ValueError, match="give h"):
        evaluate(J <= I + H, torch.arange(3), torch.arange(3))


def test_dense_masks_are_unchanged():
    steps = torch.arange(20)
    expected = (steps[:, None] - steps < 5) | (steps < 2)
    assert torch.equal(Mask((WindowOrSinks(5, 2),)).dense(steps, steps), expected)
