"""MLP blocks of whole models rewritten: proved, checked, saved, loaded, and left alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

import rewriter
from rewriter.api import _beside_mlps
from rewriter.checkpoint.keys import forward_state_dict, reverse_state_dict
from rewriter.checkpoint.load import load
from rewriter.checkpoint.write import save
from rewriter.errors import UsageError
from rewriter.mixers.channel.base import Projection
from rewriter.passes.step.model import STATE
from rewriter.plan import LinearLayer, PackedLayer
from rewriter.policy import Policy

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))
BOTH_MODELS = ["plain", pytest.param("llama", marks=pytest.mark.nightly)]


class Gated(nn.Module):
    """Residual gated MLP of the sizes of the tiny Llama."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def build(name, seed=0):
    if name == "llama":
        return tiny_models.build(name, seed=seed)
    torch.manual_seed(seed)
    return nn.Sequential(Gated(), Gated()).eval()


def policy(mixer="lowrank_mlp", **options):
    return {"minimum_sites": 0, "rules": [{"site": "mlp", "use": mixer, "options": options}]}


def inputs(name):
    if name == "llama":
        return {"input_ids": IDS}
    return {"input": torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(4))}


def outputs(model, name="llama"):
    with torch.no_grad():
        out = model(**inputs(name))
    return out if name == "plain" else out[0]


@pytest.fixture(scope="module", params=BOTH_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def original(name):
    return build(name)


@pytest.fixture(scope="module")
def halved(name, original):
    wanted = policy(ratio=0.5, projections=["gate", "down"])
    return rewriter.rewrite(original, wanted, inputs(name) if name == "plain" else None)


def modules_of(model, part):
    """The projection of each block that is called so in its own module."""
    return [m for path, m in model.named_modules() if path.endswith(part)]


def test_contracts_pass_and_the_plan_says_what_was_done(halved):
    report = rewriter.report_of(halved)
    assert report.passed
    assert {c.number for c in report.contracts if "lowrank_mlp" in c.subject} == {1, 4, 5, 9}
    assert [d.status for d in report.plan.mlps] == ["done", "done"]
    assert report.plan.mlps[0].options["sizes"] == {"gate": {"rank": 19}, "down": {"rank": 19}}


def test_only_the_chosen_projections_changed(original, halved):
    for part in ("gate_proj", "down_proj"):
        assert [type(m) for m in modules_of(halved, part)] == [Projection, Projection]
    kept = zip(modules_of(halved, "up_proj"), modules_of(original, "up_proj"), strict=True)
    assert all(new.weight is old.weight for new, old in kept)
    assert not any(isinstance(m, Projection) for m in original.modules())


def test_keys_go_back_and_forth(name, original, halved):
    back = reverse_state_dict(halved)
    assert list(back) == list(original.state_dict())
    dense = build(name, seed=1)
    dense.load_state_dict(back, strict=True)
    ours, theirs = outputs(dense, name), outputs(halved, name)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    there = forward_state_dict(original.state_dict(), halved)
    assert list(there) == list(halved.state_dict())


def test_saved_and_loaded(name, halved, tmp_path):
    save(halved, tmp_path / "small", rewriter.plan_of(halved))
    again = load(tmp_path / "small", base=build(name, seed=1) if name == "plain" else None)
    torch.testing.assert_close(outputs(again, name), outputs(halved, name), atol=0, rtol=0)
    assert not any(key.endswith("down_proj.weight") for key in again.state_dict())


def test_the_compiled_step_is_left_out(halved):
    # it would go on reading the weights that were replaced
    assert STATE not in halved.__dict__


def test_nothing_else_relies_on_a_replaced_weight(halved):
    plan = rewriter.plan_of(halved)
    (gate, up) = (f"{plan.mlps[0].fqn}.{part}_proj" for part in ("gate", "up"))
    both = plan.model_copy(
        update={
            "linears": [LinearLayer(fqn=gate), LinearLayer(fqn=up)],
            "packed": [PackedLayer(fqn="", site="")],
        }
    )
    after = _beside_mlps(both)
    assert [x.status for x in after.linears] == ["refused", "planned"]
    assert "structures replace" in (after.linears[0].reason or "")
    assert [x.status for x in after.packed] == ["refused"]
    untouched = both.model_copy(update={"mlps": []})
    assert _beside_mlps(untouched) == untouched


@pytest.mark.nightly
def test_a_plan_replays(original, halved, name):
    given = inputs(name) if name == "plain" else None
    again = rewriter.rewrite(original, rewriter.plan_of(halved), given, verify="quick")
    torch.testing.assert_close(outputs(again, name), outputs(halved, name), atol=1e-5, rtol=1e-5)


@pytest.mark.nightly
def test_full_rank_is_the_original():
    original = build("llama")
    sizes = {n: {"rank": 64} for n in ("gate", "up", "down")}
    full = rewriter.rewrite(original, policy(sizes=sizes), verify="quick")
    torch.testing.assert_close(outputs(full), outputs(original), atol=2e-3, rtol=2e-3)


@pytest.mark.nightly
def test_without_a_rule_or_with_keep_blocks_stay_as_they_are():
    original = build("llama")
    for rules in ([], [{"site": "mlp", "use": "keep"}]):
        same = rewriter.rewrite(original, {"rules": rules}, verify="none")
        assert torch.equal(outputs(same), outputs(original))
        assert rewriter.plan_of(same).mlps == []


@pytest.mark.nightly
@pytest.mark.parametrize("mixer", ["lowrank_mlp", "monarch_mlp"])
@pytest.mark.parametrize("name", [*tiny_models.CAUSAL, *tiny_models.ENCODERS])
def test_every_tiny_model(name, mixer):
    model = tiny_models.build(name)
    result = rewriter.rewrite(model, policy(mixer, ratio=0.6), verify="quick")
    plan = rewriter.plan_of(result)
    assert plan.mlps
    assert all(d.status == "done" for d in plan.mlps)
    assert list(reverse_state_dict(result)) == list(model.state_dict())


def test_a_wrong_rule_is_explained():
    with pytest.raises(UsageError, match="unknown channel mixer 'hedgehog'"):
        Policy.load({"rules": [{"site": "mlp", "use": "hedgehog"}]})
    with pytest.raises(UsageError, match="has no option 'rank'"):
        Policy.load(policy(rank=3))
    with pytest.raises(UsageError, match="select attention"):
        Policy.load({"rules": [{"site": "mlp", "use": "keep", "kind": "causal"}]})


@pytest.mark.nightly
def test_experts_are_refused_with_a_reason():
    import transformers as hf

    model = hf.MixtralForCausalLM(hf.MixtralConfig(**tiny_models.GROUPED, num_local_experts=2))
    plan, found = rewriter.make_plan_for(model.eval(), policy())
    assert [m.kind for m in found.mlps] == ["experts", "experts"]
    assert all("experts" in (d.reason or "") for d in plan.mlps)
