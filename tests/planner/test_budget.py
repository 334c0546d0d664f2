"""Plans under a budget: the limit holds, constraints hold, and the plan is an ordinary one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import rewriter
from rewriter.budgets import Budget, budget
from rewriter.errors import UsageError
from rewriter.ir.site import AttentionSite
from rewriter.planner.additivity import fitted
from rewriter.planner.budgeting import BudgetResult, pareto, plan_under, uniform
from rewriter.planner.device import Device
from rewriter.planner.objective import Probes, Score
from rewriter.planner.predict import Use, core_seconds, predict
from rewriter.planner.refine import Measured
from rewriter.planner.search import mixers_of
from rewriter.planner.trunk import trunk_of
from rewriter.policy import Policy

PROBES = Probes(passage=12, gap=(8, 16), skip=2)
SMALL = {"steps": 2, "trials": 3, "draws": 2, "context": 4096, "device": "h100-sxm-80gb"}
NEAR = {"use": "sink_window", "options": {"window": 4, "sinks": 1}}
RECURRENT = {"use": "retnet", "options": {}}


def searched(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor, **fields: object
) -> BudgetResult:
    wanted = budget(**{**SMALL, "choices": [NEAR], **fields})
    return plan_under(model, sites, wanted, stream, probes=PROBES)


def test_a_latency_budget_holds_and_counts_what_is_around(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    device = Device.load("h100-sxm-80gb")
    trunk = trunk_of(model)
    mixed = [Use(s, "fused" if n else "sink_window", NEAR["options"] if not n else {})
             for n, s in enumerate(sites)]  # fmt: skip
    near, full = (core_seconds(device, use, "prefill", 4096) for use in mixed[:2])
    room = predict(device, trunk, mixed, "prefill", 4096).seconds + 0.2 * (full - near)
    found = searched(model, sites, stream, latency=room)
    assert found.predicted == pytest.approx(room - 0.2 * (full - near))
    assert found.predicted <= found.costs.limit * (1 + 1e-9)
    targets = [d.target for d in found.plan.decisions]
    assert targets.count("fused") == 2 and [d.index for d in found.plan.decisions] == [0, 1, 2]
    uses = [Use(s, d.target, d.options) for s, d in zip(sites, found.plan.decisions, strict=True)]
    assert predict(device, trunk, uses, "prefill", 4096).seconds == pytest.approx(found.predicted)
    rewritten = rewriter.rewrite(model, found.plan, verify="none")
    ids = torch.randint(3, 96, (1, 30))
    with torch.no_grad():
        ours = rewritten(ids, use_cache=False).logits
        theirs = found.space.model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    costs = [cost for cost, _ in found.front]
    values = [m.value for _, m in found.front]
    assert costs == sorted(costs) and values == sorted(values, reverse=True)
    assert found.additivity.assignments > 0
    data = found.to_json()
    assert data["predicted"] == found.predicted and len(data["front"]) == len(costs)


def test_memory_kinds_never_and_bounded(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    found = searched(
        model, sites, stream, memory="0.5x", choices=[NEAR, RECURRENT], kinds=2, never=[-1]
    )
    assert found.plan.decisions[2].target == "fused"
    assert found.predicted <= 0.5 * found.costs.exact
    assert len(mixers_of(found.space, found.search.best.picks)) <= 2
    bounded = searched(model, sites, stream, memory="0.5x", choices=[NEAR, RECURRENT], bounded=True)
    assert {d.target for d in bounded.plan.decisions} <= {"sink_window", "retnet"}


def test_a_budget_is_a_policy_in_python_yaml_and_rewrite(
    model: torch.nn.Module, stream: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "budget:\n  memory: 0.7x\n  context: 4096\n  steps: 1\n  trials: 0\n  draws: 1\n"
    )
    policy = Policy.load(file)
    assert policy.budget == budget(memory="0.7x", context=4096, steps=1, trials=0, draws=1)
    long = torch.cat([stream] * 3)
    student = rewriter.rewrite(model, policy, calibration=[long[None]], verify="none")
    used = [d.target for d in rewriter.plan_of(student).decisions]
    assert used.count("fused") == 2 and used.count("sink_window") == 1
    with pytest.raises(UsageError, match="calibration"):
        rewriter.rewrite(model, budget(memory="0.7x"), verify="none")
    with pytest.raises(UsageError, match="has to be measured"):
        rewriter.make_plan_for(model, policy)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly|give one of"),
        ({"latency": 1.0, "memory": 1.0}, "give one of"),
        ({"latency": "fast"}, "'fast' is no latency"),
        ({"memory": "12 stones"}, "is no memory"),
        ({"latency": "-1"}, "is no latency"),
        ({"latency": "0 ms"}, "greater than 0"),
        ({"memory": "1 MiB", "window": 3}, "window"),
        ({"memory": "1 MiB", "choices": []}, "names no mixer"),
        ({"memory": "1 MiB", "kinds": 0}, "kinds"),
    ],
)
def test_bad_budgets_name_the_field(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        budget(**fields)


def test_units() -> None:
    assert budget(latency="40 ms").limit.of(9.0) == pytest.approx(0.04)
    assert budget(memory="1.5 MiB").limit.of(9.0) == 1.5 * 2**20
    assert budget(memory="0.25x").limit.of(8.0) == 2.0
    assert budget(latency=3).limit.of(9.0) == 3.0
    assert "0.5 x" in budget(latency="0.5x", context=8192).describe()


def test_what_cannot_be_met_says_by_how_much(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    with pytest.raises(UsageError, match="the cheapest plan takes"):
        searched(model, sites, stream, memory="10 B")
    with pytest.raises(UsageError, match="'never' names site 7"):
        searched(model, sites, stream, memory="0.5x", never=[7])
    with pytest.raises(UsageError, match="no profile 'nowhere'"):
        searched(model, sites, stream, latency="0.5x", device="nowhere")
    with pytest.raises(UsageError, match=r"budget.choices\[0\]|unknown mixer"):
        Policy.load({"budget": {"memory": "1 MiB", "choices": [{"use": "windoww"}]}})
    with pytest.raises(UsageError, match="a budget decides every site"):
        Policy.load({"budget": {"memory": "1 MiB"}, "rules": [{"use": "keep"}]})


def test_uniform_placement_has_each_candidate_as_often_evenly_spread() -> None:
    assert uniform((0, 0, 1, 1, 1, 1)) == (1, 0, 1, 1, 0, 1)
    assert sorted(uniform((2, 1, 1, 0, 1, 2, 2))) == [0, 1, 1, 1, 2, 2, 2]
    assert uniform((1, 1, 1)) == (1, 1, 1)


def test_a_layer_without_attention_saves_its_projections(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    device = Device.load("h100-sxm-80gb")
    trunk = trunk_of(model)
    exact, dropped = (
        predict(device, trunk, [Use(s, mixer, {}) for s in sites], "prefill", 4096)
        for mixer in ("fused", "drop")
    )
    around = tuple(m for m in trunk.matrices if m.inputs != 32 or m.outputs not in (16, 32))
    bare = dataclasses.replace(trunk, matrices=around)
    assert dropped.products < exact.products
    assert dropped.products == pytest.approx(
        predict(device, bare, [], "prefill", 4096).products, rel=1e-6
    )
    found = searched(
        model, sites, stream, latency=0.99 * exact.seconds, trials=0, choices=[{"use": "drop"}]
    )
    assert found.predicted <= found.costs.limit
    assert {d.target for d in found.plan.decisions} <= {"fused", "drop"}


def test_a_measured_forward_takes_the_place_of_the_predicted_one(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    wanted = budget(latency="1x", device="h100-sxm-80gb", trials=0, draws=1)
    found = plan_under(model, sites, wanted, stream, probes=PROBES, exact_seconds=5.0)
    assert found.costs.exact == 5.0 and found.costs.limit == 5.0
    assert found.predicted <= 5.0


def test_a_front_drops_what_is_beaten_and_additive_truth_is_recognised() -> None:
    def at(value: float, *picks: int) -> Measured:
        return Measured(picks, Score(value, 0.0), value)

    front = pareto([(3.0, at(1.0, 0)), (1.0, at(4.0, 1)), (2.0, at(5.0, 2)), (3.0, at(2.0, 3))])
    assert [(c, m.value) for c, m in front] == [(1.0, 4.0), (3.0, 1.0)]
    harms = [[0.0, 1.0], [0.0, 2.0]]
    exact = fitted(harms, [at(10 + 3.0, 1, 0), at(10 + 6.0, 0, 1), at(10 + 9.0, 1, 1)], 10.0)
    assert exact.factor == pytest.approx(3.0) and exact.error == pytest.approx(0.0)
    assert exact.correlation == pytest.approx(1.0)
    assert fitted(harms, [at(10.0, 1, 0), at(12.0, 0, 1), at(19.0, 1, 1)], 10.0).error > 0.5


def test_costs_of_a_space_are_those_of_its_sites(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...]
) -> None:
    from rewriter.planner import Candidate, open_space

    wanted = [Candidate("keep"), Candidate("sink_window", NEAR["options"])]  # type: ignore[arg-type]
    space = open_space(model, sites, wanted, cost=lambda site, c: site.index + len(c.mixer))
    assert space.costs == [[n + 4.0, n + 11.0] for n in range(3)]
    assert dataclasses.replace(wanted[0], cost=4.0) == space.candidates[0][0]
    assert isinstance(budget(memory=1), Budget)
