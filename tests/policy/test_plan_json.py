from __future__ import annotations

import json
from pathlib import Path

import pytest
from policy_stubs import make_site

from rewriter.errors import UsageError
from rewriter.ir.mask import Causal, Mask, Window
from rewriter.ir.site import AttentionSite, FillTerm, HeadGroups, Scale
from rewriter.plan import PLAN_VERSION, Decision, Plan
from rewriter.policy import Policy, make_plan


@pytest.fixture
def plan(sites: list[AttentionSite]) -> Plan:
    return make_plan(Policy.load("hybrid"), sites)


def test_file_round_trip(plan: Plan, tmp_path: Path, sites: list[AttentionSite]) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    again.check_against(sites)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_minus_infinity_survives_strict_json(tmp_path: Path) -> None:
    site = make_site(0, score=(Scale(0.5), FillTerm(0, float("-inf"), keep=False)))
    plan = make_plan(Policy(), [site])
    text = json.dumps(plan.to_json(), allow_nan=False)
    again = Plan.from_json(text)
    restored = AttentionSite.from_json(again.decisions[0].site)
    assert restored.score[1] == FillTerm(0, float("-inf"), keep=False)
    again.check_against([site])


def test_hand_edit_is_honoured(plan: Plan, tmp_path: Path) -> None:
    data = plan.to_json()
    data["decisions"][3].update(target="sink_window", options={"window": 32})
    assert Plan.from_json(data).decisions[3].target == "sink_window"


def edited(plan: Plan, tmp_path: Path, old: str, new: str) -> str:
    path = tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message


def line_of(plan: Plan, text: str) -> int:
    lines = json.dumps(plan.to_json(), indent=2).splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


def test_errors_point_at_the_line(plan: Plan, tmp_path: Path) -> None:
    message = edited(plan, tmp_path, '"hedgehog_window"', '"hedghog_window"')
    assert f":{line_of(plan, 'hedgehog_window')}:" in message
    assert "did you mean 'hedgehog_window'" in message
    message = edited(plan, tmp_path, '"window": 64', '"window": "many"')
    option = line_of(plan, '"window": 64')
    assert f":{option}:" in message
    message = edited(plan, tmp_path, '"status": "planned"', '"status": "maybe"')
    assert f":{line_of(plan, 'status')}:" in message
    message = edited(plan, tmp_path, '"target"', '"targt"')
    assert "'targt'" in message or "'target' is missing" in message


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1,\n "decisions": [}')
    with pytest.raises(UsageError, match=r"plan.json:2:16: not valid JSON"):
        Plan.load(path)


def test_newer_version_is_refused_before_anything_else(plan: Plan) -> None:
    data = {**plan.to_json(), "version": PLAN_VERSION + 1, "novelty": True}
    with pytest.raises(UsageError, match=r"newer version.*upgrade attention-rewriter"):
        Plan.from_json(data)


def test_other_architecture_is_named(plan: Plan, sites: list[AttentionSite]) -> None:
    other = [make_site(i) for i in range(8)]
    other[5] = make_site(5, heads=HeadGroups(4, 4, 16, 16))
    with pytest.raises(UsageError, match=r"site 5 .*differs from the plan in 'heads'"):
        plan.check_against(other)
    other[5] = make_site(5, mask=Mask((Causal(), Window(9))))
    with pytest.raises(UsageError, match=r"site 5 .*differs from the plan in 'mask'"):
        plan.check_against(other)
    other[5] = make_site(5, fqn="model.layers.5.attn")
    with pytest.raises(UsageError, match=r"is 'model.layers.5.attn', but the plan expects"):
        plan.check_against(other)
    with pytest.raises(UsageError, match=r"decides site 6 .* the model has 6 attention sites"):
        plan.check_against(sites[:6])
    with pytest.raises(UsageError, match="no decision for site 8"):
        plan.check_against([*sites, make_site(8)])


def test_source_lines_may_differ(plan: Plan) -> None:
    from dataclasses import replace

    moved = [make_site(i) for i in range(8)]
    moved = [replace(s, source=replace(s.source, file="elsewhere.py", line=3)) for s in moved]
    plan.check_against(moved)


def test_hand_written_decision_without_facts() -> None:
    plan = Plan(decisions=[Decision(fqn="model.layers.0.self_attn", index=0, target="keep")])
    plan.check_against([make_site(0)])
    plan.decisions[0].site = {"heads": 3}
    with pytest.raises(UsageError, match="facts of site 0 in the plan cannot be read"):
        plan.check_against([make_site(0)])
