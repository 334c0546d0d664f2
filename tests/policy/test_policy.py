from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_stubs import make_site

from rewriter.errors import NoSiteError, UsageError
from rewriter.ir.mask import Mask
from rewriter.ir.site import AttentionSite, NearMiss, Source
from rewriter.policy import Policy, Rule, chosen, make_plan, preset_names, presets

PRESETS = {
    "identity",
    "sink-window",
    "hedgehog",
    "hybrid",
    "smollm2-hybrid",
    "encoder-hybrid",
    "exact",
    "five-to-one",
    "one-in-eight",
    "retrieval-heads",
}


def targets_of(policy: Policy, sites: list[AttentionSite]) -> list[str]:
    return [decision.target for decision in make_plan(policy, sites).decisions]


def test_all_presets_load_and_describe_themselves() -> None:
    assert set(presets()) == PRESETS == set(preset_names())
    for name, policy in presets().items():
        assert policy.name == name
        assert len(policy.description) > 30


def test_preset_smollm2_hybrid_keeps_the_scanned_layers() -> None:
    chosen_layers = {0, 7, 14, 15, 18, 19, 20, 23}
    plan = make_plan(Policy.load("smollm2-hybrid"), [make_site(i) for i in range(30)])
    kept = {d.index for d in plan.decisions if d.target == "keep"}
    assert kept == chosen_layers
    others = [d for d in plan.decisions if d.target != "keep"]
    expected = {"window": 64, "sinks": 4, "initial_log_ratio": -3.0}
    assert all(d.options == expected for d in others)
    assert {d.target for d in others} == {"hedgehog_window"}


def test_first_rule_wins_and_default_covers_the_rest(sites: list[AttentionSite]) -> None:
    policy = Policy(
        rules=(
            Rule(use="keep", layers=(0, -1)),
            Rule(use="hedgehog", fqn="*.layers.[0-3].*"),
            Rule(use="sink_window", layers=("odd",), options={"window": 8}),
        ),
    )
    got = targets_of(policy, sites)
    assert got == ["keep", *["hedgehog"] * 3, "keep", "sink_window", "keep", "keep"]


def test_kind_and_position_select() -> None:
    mixed = [make_site(0), make_site(1, causal=False), make_site(2, position="alibi")]
    policy = Policy.load(
        {
            "rules": [
                {"kind": "bidirectional", "use": "sink_window"},
                {"position": "alibi", "use": "hedgehog"},
            ]
        }
    )
    assert targets_of(policy, mixed) == ["keep", "sink_window", "hedgehog"]


@given(count=st.integers(1, 40), start=st.integers(-5, 45), step=st.integers(1, 7))
def test_slices_are_python_slices(count: int, start: int, step: int) -> None:
    assert list(chosen(f"{start}::{step}", count)) == list(range(count))[start::step]


def test_selectors() -> None:
    assert list(chosen("0-3", 8)) == [0, 1, 2, 3]
    assert list(chosen("even", 5)) == [0, 2, 4]
    assert list(chosen("last", 5)) == [4]
    assert list(chosen(-2, 5)) == [3]
    assert list(chosen("::4", 9)) == [0, 4, 8]


def test_refused_site_becomes_a_refused_decision() -> None:
    opaque = make_site(1, mask=Mask(opaque="a mask from a random number"))
    plan = make_plan(Policy.load("sink-window"), [make_site(0), opaque])
    assert [d.status for d in plan.decisions] == ["planned", "refused"]
    assert plan.decisions[1].reason == "the mask is opaque (a mask from a random number)"
    assert plan.decisions[1].target == "sink_window"


def test_decision_carries_complete_options_tier_rule_and_facts() -> None:
    site = make_site(0)
    (decision,) = make_plan(
        Policy.load({"rules": [{"use": "sink_window", "options": {"window": 9}}]}), [site]
    ).decisions
    assert decision.options == {"window": 9, "sinks": 4}
    assert decision.tier == "approximate"
    assert decision.rule == "rule 1 (all sites)"
    assert AttentionSite.from_json(decision.site) == AttentionSite.from_json(site.to_json())


def test_too_few_sites_name_the_near_miss() -> None:
    miss = NearMiss("match", "the softmax runs over queries", Source("softmax_1", "enc"))
    with pytest.raises(NoSiteError, match=r"no attention was found.*softmax runs over queries"):
        make_plan(Policy(), [], [miss])
    with pytest.raises(NoSiteError, match=r"only 1 attention sites were.*at least 3"):
        make_plan(Policy(minimum_sites=3), [make_site(0)])


def test_layer_that_does_not_exist_is_an_error(sites: list[AttentionSite]) -> None:
    with pytest.raises(UsageError, match=r"rule 1 .* layer 23, .* 8 attention sites \(0 to 7\)"):
        make_plan(Policy(rules=(Rule(use="keep", layers=(0, 23)),)), sites)


def test_glob_without_any_site_is_an_error(sites: list[AttentionSite]) -> None:
    with pytest.raises(UsageError, match=r"'encoder\.\*'.*first one is 'model.layers.0.self_attn'"):
        make_plan(Policy(rules=(Rule(use="keep", fqn="encoder.*"),)), sites)


def fails(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Policy.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules:\n  - use: keep\n    lyers: [1]\n", ":3:5: unknown key 'lyers'; did you mean 'lay"),
        ("rulez: []\n", ":1:1: unknown key 'rulez'; did you mean 'rules'?"),
        ("rules:\n  - use: sink_windw\n", ":2:10: unknown mixer 'sink_windw'; did you mean 'sink"),
        ("default: hedgehogs\n", ":1:10: unknown mixer 'hedgehogs'; did you mean 'hedgehog'"),
        (
            "rules:\n  - use: sink_window\n    options:\n      windw: 3\n",
            ":4:7: 'sink_window' has no option 'windw'; did you mean 'window'?",
        ),
        (
            "rules:\n  - use: sink_window\n    options: {sinks: 2, window: wide}\n",
            ":3:33: option 'window' of 'sink_window'",
        ),
        ("rules:\n  - use: sink_window\n    options: {window: 0}\n", "greater than or equal to 1"),
        ("rules:\n  - layers: [0]\n", ":2:5: the key 'use' is missing"),
        ("rules:\n  - use: keep\n    kind: casual\n", ":3:11: 'kind': input should be 'causal'"),
        (
            "rules:\n  - use: keep\n    layers: [0, evn]\n",
            "selects no layers; did you mean 'even'?",
        ),
        ("rules:\n  - use: keep\n    layers: [1.5]\n", ":3:14: 'layers'"),
        ("rules: 3\n", ":1:8: 'rules': "),
        ("- use: keep\n", ":1:1: a policy is a mapping"),
        ("name: x\nname: y\n", ":2:1: the key 'name' is already given in line 1"),
        ("rules: [\n", ":2:1: "),
        ("name: !!python/object/apply:os.system [id]\n", ":1:7: the tag"),
        ("", " is empty"),
        ("name: a\n---\nname: b\n", ":2:1: "),
    ],
)
def test_yaml_errors_point_at_the_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in fails(tmp_path, text)


def test_several_errors_are_counted(tmp_path: Path) -> None:
    assert fails(tmp_path, "a: 1\nb: 2\n").endswith("(and 1 more)")


def test_yaml_scalars_keep_their_meaning(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: no\ndescription: 1:30\nrules:\n  - use: keep\n    layers: 0-3\n")
    policy = Policy.load(str(path))
    assert (policy.name, policy.description) == ("no", "1:30")
    assert policy.rules[0].layers == ("0-3",)


def test_name_defaults_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("default: keep\n")
    assert Policy.load(path).name == "mine"


def test_unknown_preset_suggests() -> None:
    with pytest.raises(UsageError, match=r"no preset policy 'hybrd'; did you mean 'hybrid'\?"):
        Policy.load("hybrd")


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"no/such.yaml does not exist"):
        Policy.load("no/such.yaml")


def test_mapping_errors_name_the_path() -> None:
    with pytest.raises(UsageError, match=r"policy, at rules\[0\].options.windw: .*'window'"):
        Policy.load({"rules": [{"use": "sink_window", "options": {"windw": 1}}]})


def test_policy_object_with_unknown_mixer() -> None:
    with pytest.raises(UsageError, match="unknown mixer 'linear'"):
        Policy.load(Policy(default="linear"))
