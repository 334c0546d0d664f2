"""The search under a budget: exact knapsack, honest slopes, plans that replay."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewriter
from rewriter.errors import InputError, NoSiteError, UsageError
from rewriter.ir.site import AttentionSite
from rewriter.planner import (
    Candidate,
    Objective,
    Probes,
    SearchOptions,
    SearchSpace,
    knapsack,
    open_space,
    search,
)
from rewriter.planner.refine import Judge
from rewriter.planner.relax import slopes

PROBES = Probes(passage=12, gap=(8, 16), skip=2)
WINDOW = {"window": 4, "sinks": 1}
VOCABULARY = 96


@pytest.fixture(scope="module")
def space(model: torch.nn.Module, sites: tuple[AttentionSite, ...]) -> SearchSpace:
    return open_space(model, sites, [Candidate("sink_window", WINDOW), Candidate("keep", {}, 1.0)])


@pytest.fixture(scope="module")
def objective() -> Objective:
    stream = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(0))
    return Objective(stream, PROBES)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_knapsack_is_the_best_of_all_assignments(data: st.DataObject) -> None:
    sites = data.draw(st.integers(1, 5))
    rows = [data.draw(st.integers(1, 3)) for _ in range(sites)]
    value = st.floats(0, 10, allow_nan=False)
    harms = [[data.draw(value) for _ in range(r)] for r in rows]
    costs = [[float(data.draw(st.integers(-3, 6))) for _ in range(r)] for r in rows]
    budget = float(data.draw(st.integers(-4, 20)))
    every = [
        (sum(h[p] for h, p in zip(harms, picks, strict=True)), picks)
        for picks in itertools.product(*(range(r) for r in rows))
        if sum(c[p] for c, p in zip(costs, picks, strict=True)) <= budget
    ]
    if not every:
        with pytest.raises(UsageError, match="cheapest"):
            knapsack(harms, costs, budget)
        return
    found = knapsack(harms, costs, budget)
    assert math.isclose(found.harm, min(every)[0], abs_tol=1e-9)
    assert found.cost <= budget


@settings(deadline=None, max_examples=40)
@given(st.floats(0.1, 7.3), st.lists(st.floats(0.01, 1.7), min_size=3, max_size=3))
def test_a_fractional_budget_is_never_exceeded(budget: float, costs: list[float]) -> None:
    rows = [[c, 0.0] for c in costs]
    assert knapsack([[0.0, 1.0]] * 3, rows, budget).cost <= budget + 1e-9


def test_a_budget_of_exactly_the_cheapest_assignment_is_met() -> None:
    rows = [[700.5, 530.9], [700.5, 531.2], [700.5, 530.9]]
    found = knapsack([[0.0, 1.0]] * 3, rows, sum(r[1] for r in rows))
    assert found.picks == (1, 1, 1)


def test_a_shared_start_changes_no_score(space: SearchSpace, objective: Objective) -> None:
    judge, apart = Judge(space, objective, range(2)), Judge(space, objective, range(2))
    judge(base := (1, 0, 1))
    judge.start_from(base)
    for picks in itertools.product((0, 1), repeat=3):
        assert judge(picks) == apart(picks)


def test_a_stopped_search_goes_on_from_its_journal(
    space: SearchSpace, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "journal"
    options = SearchOptions(trials=4, draws=2, journal=file)
    whole = search(space, objective, 1.0, options)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:7], lines[7][:5]]) + "\n")
    again = search(space, objective, 1.0, options)
    assert again.best == whole.best and again.measured == whole.measured

    def stop(*args: object) -> None:
        raise AssertionError("a score that is known was measured again")

    monkeypatch.setattr(Objective, "score", stop)
    assert search(space, objective, 1.0, options).best == whole.best
    with pytest.raises(InputError, match="another search"):
        search(
            space, dataclasses.replace(objective, probes=Probes(12, 1, (8, 16), 2)), 1.0, options
        )


def test_a_limit_on_perplexity_decides(space: SearchSpace, objective: Objective) -> None:
    free = Judge(space, objective, range(2))
    limited = Judge(space, dataclasses.replace(objective, limit=1.0), range(2))
    exact = free(space.exact)
    for picks in itertools.product((0, 1), repeat=3):
        one, other = free(picks), limited(picks)
        excess = max(0.0, one.score.text - exact.score.text)
        assert other.value == pytest.approx(one.value + 20 * excess)


def test_picking_equals_a_weight_of_one(space: SearchSpace, objective: Objective) -> None:
    picks = (0, 1, 0)
    space.use(picks)
    with torch.no_grad():
        picked = objective.total(space.model, 0)
        space.use_weights([torch.eye(2)[p] for p in picks])
        weighted = objective.total(space.model, 0)
    assert float(picked) == pytest.approx(float(weighted), rel=1e-6)


def test_slopes_are_derivatives(space: SearchSpace, objective: Objective) -> None:
    picks = (1, 0, 1)
    found = slopes(space, objective, picks, range(1))
    base = [torch.eye(2)[p].double() for p in picks]
    step = 1e-2
    for site, candidate in itertools.product(range(3), range(2)):
        sides = []
        for sign in (1, -1):
            weights = [w.clone() for w in base]
            weights[site][candidate] += sign * step
            space.use_weights(weights)
            with torch.no_grad():
                sides.append(float(objective.total(space.model, 0)))
        slope = (sides[0] - sides[1]) / (2 * step)
        assert found[site][candidate] == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_a_search_keeps_the_budget_and_its_plan_replays(
    model: torch.nn.Module, space: SearchSpace, objective: Objective
) -> None:
    result = search(space, objective, 1.0, SearchOptions(steps=3, trials=4, draws=1))
    assert result.cost <= 1.0
    assert result.best.value == min(m.value for m in result.measured)
    assert result.best.value <= result.start.value
    # nothing else within the budget that was measured is better, and every measurement is true
    again = Judge(space, objective, range(10_000, 10_001))(result.best.picks)
    assert again.value == pytest.approx(result.best.value, rel=1e-6)
    rewritten = rewriter.rewrite(model, result.plan, verify="none")
    ids = torch.randint(3, VOCABULARY, (2, 20))
    with torch.no_grad():
        theirs = space.model(ids, use_cache=False).logits
        torch.testing.assert_close(rewritten(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_bad_searches_say_what_to_do(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], space: SearchSpace
) -> None:
    with pytest.raises(InputError, match="at least 40 tokens"):
        Objective(torch.zeros(10, dtype=torch.int64), PROBES)
    with pytest.raises(NoSiteError, match="no site has a choice"):
        open_space(model, sites, [Candidate("keep")])
    with pytest.raises(UsageError, match="without a cache"):
        space.model(torch.zeros(1, 4, dtype=torch.int64), use_cache=True)


def test_a_search_in_half_precision_is_decided_in_full(
    space: SearchSpace,
    model: torch.nn.Module,
    sites: tuple[AttentionSite, ...],
    objective: Objective,
) -> None:
    choices = [Candidate("sink_window", WINDOW), Candidate("keep", {}, 1.0)]
    fast = open_space(model, sites, choices, dtype=torch.bfloat16)
    assert {p.dtype for p in fast.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    options = SearchOptions(steps=2, trials=4, draws=2, finalists=3)
    found = search(fast, objective, 1.0, options, precise=space)
    judge = Judge(space, objective, options.probes)
    again = [judge(m.picks) for m in found.measured[:3]]
    assert found.best == min(again, key=lambda m: m.value)
    assert found.judge.space is space and found.start == judge(found.start.picks)
    assert found.cost == space.cost(found.best.picks) <= 1.0
