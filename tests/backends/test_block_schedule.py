"""Block schedules: no tile missing, none twice, full where the predicate allows everything."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import sympy
import torch
from mask_cases import Case, drawn, named, read
from torch.nn.attention.flex_attention import create_block_mask

from rewriter.backends.schedule import Schedule, Work, schedule, transpose, work
from rewriter.ir.block_sparse import CAUSAL, EVERYTHING, causal_window
from rewriter.ir.lookup import lookup
from rewriter.ir.mask import VALID, B, H, I, J

N = 60


def allowed(case: Case, heads: int, M: int, n: int, offset: int) -> np.ndarray:
    h, i, j = np.ogrid[:heads, offset : offset + M, :n]
    return np.broadcast_to(case.plain(h, i, j), (heads, M, n))


def tiles(pairs: np.ndarray, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(any pair, every pair) of each tile, (heads, rows, columns)."""
    rows, columns = range(0, pairs.shape[1], block_q), range(0, pairs.shape[2], block_k)
    some = np.logical_or.reduceat(np.logical_or.reduceat(pairs, rows, 1), columns, 2)
    every = np.logical_and.reduceat(np.logical_and.reduceat(pairs, rows, 1), columns, 2)
    return some, every


def unpacked(plan: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(visits, full) of each tile, (heads, rows, columns)."""
    starts, blocks, full = (x.numpy() for x in (plan.starts, plan.blocks, plan.full))
    rows, columns = starts.shape[1] - 1, -(-plan.N // plan.block_k)
    visits = np.zeros((plan.heads, rows, columns), dtype=int)
    whole = np.zeros_like(visits)
    for h in range(plan.heads):
        line = starts[h if starts.shape[0] > 1 else 0]
        for r in range(rows):
            part = slice(line[r], line[r + 1])
            assert (np.diff(blocks[part]) > 0).all(), "ascending"
            np.add.at(visits[h, r], blocks[part], 1)
            whole[h, r, blocks[part]] = full[part]
    return visits, whole


def check(case: Case, heads: int, M: int, n: int, block_q: int, block_k: int, offset: int) -> None:
    plan = schedule(case.mask, M, n, heads, block_q, block_k, offset)
    visits, whole = unpacked(plan)
    some, every = tiles(allowed(case, heads, M, n, offset), block_q, block_k)
    where = f"{case.name} at M={M} N={n} blocks={block_q}x{block_k} offset={offset}"
    assert visits.max(initial=0) <= 1, f"tile twice: {where}"
    assert np.array_equal(visits > 0, some), f"tiles: {where}"
    assert np.array_equal(whole > 0, every & some), f"full flags: {where}"


@pytest.mark.parametrize("seed", range(10))
def test_random_predicates(seed):
    rng = random.Random(seed)
    for _ in range(210):
        case = drawn(rng, N)
        M, n = rng.randint(1, N), rng.randint(1, N)
        block_q, block_k = rng.choice([1, 3, 4, 8, 16]), rng.choice([2, 4, 5, 8, 16])
        check(case, 2, M, n, block_q, block_k, rng.choice([0, 0, n, 7]))


def test_many_tiles():
    """Enough tiles that rectangles are cut several times."""
    rng = random.Random(123)
    for case in [*named(300), *(drawn(rng, 300) for _ in range(40))]:
        M, n, offset = rng.randint(150, 300), rng.randint(200, 300), rng.choice([0, 9])
        check(case, 2, M, n, rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), offset)


@pytest.mark.parametrize("case", named(N), ids=lambda c: c.name)
def test_named_predicates(case):
    for M, n, block_q, block_k, offset in (
        *((N, N, 8, 8, 0), (N, N, 16, 4, 0), (N, N, 5, 7, 0)),
        *((1, N, 16, 16, N - 1), (N, 1, 8, 8, 0), (20, N, 8, 16, 40)),
    ):
        check(case, 2, M, n, block_q, block_k, offset)


def against_flex(case: Case, heads: int, n: int, block_q: int, block_k: int) -> None:
    flex = create_block_mask(
        lambda b, h, i, j: case.plain(h, i, j) & (b == b),
        *(None, heads, n, n),
        device="cpu",
        BLOCK_SIZE=(block_q, block_k),
    )
    rows, columns = -(-n // block_q), -(-n // block_k)
    expected = np.zeros((2, heads, rows, columns), dtype=int)
    lists = (
        (flex.kv_num_blocks, flex.kv_indices),
        (flex.full_kv_num_blocks, flex.full_kv_indices),
    )
    for kind, (counts, indices) in enumerate(lists):
        for h, r in np.ndindex(heads, rows):
            expected[kind, h, r, indices[0, h, r, : int(counts[0, h, r])].numpy()] = 1
    visits, whole = unpacked(schedule(case.mask, n, n, heads, block_q, block_k))
    # create_block_mask calls a ragged tile partial even where every real pair is allowed.
    ragged_q, ragged_k = n % block_q != 0, n % block_k != 0
    whole[:, -1] *= not ragged_q
    whole[:, :, -1] *= not ragged_k
    assert np.array_equal(visits, expected[0] + expected[1]), case.name
    assert np.array_equal(whole, expected[1]), case.name


@pytest.mark.parametrize("case", named(N), ids=lambda c: c.name)
def test_named_predicates_as_flex_attention_sees_them(case):
    against_flex(case, 2, N, 8, 8)
    against_flex(case, 2, N, 4, 12)


def test_random_predicates_as_flex_attention_sees_them():
    rng = random.Random(99)
    for _ in range(120):
        against_flex(drawn(rng, N, 2), 2, N, rng.choice([4, 10, 16]), rng.choice([5, 8, 20]))


def test_large_schedules_are_made_quickly_and_exactly():
    started = time.process_time()
    n, block = 32768, 64
    plan = schedule(causal_window(512, 4), n, n, 8, block, block)
    causal = schedule(CAUSAL, n, n, 8, block, block)
    spent = time.process_time() - started
    assert spent < 0.5  # a few milliseconds; an N x N tensor would take many seconds
    rows = n // block
    assert causal.starts.shape == (1, rows + 1)
    assert work(causal).tiles == 8 * rows * (rows + 1) // 2
    assert work(causal).full == 8 * rows * (rows - 1) // 2
    last = plan.blocks[int(plan.starts[0, -2]) :]
    assert last.tolist() == [0, *range(rows - 9, rows)]


def test_a_million_tokens_need_no_quadratic_memory():
    n = 1 << 20
    plan = schedule(causal_window(256), n, n, 1, 128, 128)
    assert plan.blocks.numel() == 3 * (n // 128) - 3


def test_transposed_schedule_lists_the_same_tiles_by_key_block():
    for case in named(N):
        plan = schedule(case.mask, 50, N, 2, 8, 16, 10)
        other = transpose(plan)
        visits, whole = unpacked(plan)
        for h in range(other.starts.shape[0]):
            for c in range(other.starts.shape[1] - 1):
                part = slice(int(other.starts[h, c]), int(other.starts[h, c + 1]))
                rows = other.blocks[part].numpy()
                assert np.array_equal(rows, np.flatnonzero(visits[h, :, c])), case.name
                assert np.array_equal(other.full[part].numpy(), whole[h, rows, c])


def test_work_counts_the_visited_pairs():
    for case in named(N):
        plan = schedule(case.mask, 50, N, 2, 8, 16, 10)
        visits, whole = unpacked(plan)
        height = [min(8, 50 - 8 * r) for r in range(visits.shape[1])]
        width = [min(16, N - 16 * c) for c in range(visits.shape[2])]
        pairs = (visits * np.outer(height, width)).sum()
        assert work(plan) == Work(int(visits.sum()), int(whole.sum()), int(pairs)), case.name


def test_layout_is_what_kernels_read():
    plan = schedule(CAUSAL, 100, 100, 4, 32, 16)
    assert (plan.starts.dtype, plan.blocks.dtype) == (torch.int32, torch.int32)
    assert plan.full.dtype == torch.uint8
    assert all(x.is_contiguous() for x in (plan.starts, plan.blocks, plan.full))
    assert plan.starts[0].tolist() == [0, 2, 6, 12, 19]
    assert schedule(sympy.Le(J, I + H), 100, 100, 4, 32, 16).starts.shape == (4, 5)
    assert schedule(CAUSAL, 100, 100, 4, 32, 16) is plan


def test_equal_tables_are_equal_predicates():
    table = np.eye(3, dtype=bool)
    one, two = lookup(table, I // 4, J // 4), lookup(table.copy(), I // 4, J // 4)
    assert one == two and hash(one) == hash(two)
    assert one != lookup(~table, I // 4, J // 4)
    assert schedule(one, 12, 12, 1, 4, 4) is schedule(two, 12, 12, 1, 4, 4)
    assert read(table, np.array([0, 5]), np.array([0, 0])).tolist() == [True, False]


def test_a_tile_beyond_the_looking_budget_stays_partial(monkeypatch):
    monkeypatch.setattr("rewriter.backends.schedule.tiles.PAIRS", 0)
    schedule.cache_clear()
    for case in named(N):
        visits, whole = unpacked(schedule(case.mask, N, N, 2, 8, 8))
        some, every = tiles(allowed(case, 2, N, N, 0), 8, 8)
        assert (visits <= 1).all() and (visits >= some).all() and (whole <= every).all()
    schedule.cache_clear()


@pytest.mark.parametrize(
    "mask", [sympy.Eq(VALID(B, J), 1), sympy.Lt(B, J), sympy.sin(I) > J, sympy.Eq(I**J, 1)]
)
def test_what_cannot_be_evaluated_is_refused(mask):
    with pytest.raises(ValueError, match="mask predicate"):
        schedule(mask, 8, 8, 1, 4, 4)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive sizes"):
        schedule(EVERYTHING, 0, 8, 1, 4, 4)
