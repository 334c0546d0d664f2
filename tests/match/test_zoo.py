"""Every architecture that must be understood, in each spelling: exactly its sites, exact facts."""

from __future__ import annotations

import pytest
import torch
from attention_zoo import CASES, LOOK_ALIKE, ZOO, found
from core_oracle import canonical, core_from_description, values_of

from rewriter.ir.site import AttentionSite
from rewriter.passes.capture import Captured, capture, module_path
from rewriter.passes.match import match


def _parameters():
    for c in CASES:
        marks = [pytest.mark.nightly] if c in LOOK_ALIKE else []
        yield pytest.param(c, id="-".join(c), marks=marks)


@pytest.fixture(params=_parameters(), scope="module")
def case(request):
    return request.param


def test_exactly_the_sites_of_the_model(case):
    model, here = ZOO[case[0]], found(*case)
    assert [m.site.fqn for m in here.result.matches] == [
        model.expected.owner.format(i) for i in range(2)
    ]
    assert [m.site.index for m in here.result.matches] == [0, 1]
    assert len(here.result.misses) == model.misses


def test_facts(case):
    expected = ZOO[case[0]].expected
    for i, item in enumerate(found(*case).result.matches):
        site = item.site
        heads = site.heads
        assert (heads.query, heads.key_value) == (4, expected.key_value)
        assert (heads.key_dim, heads.value_dim) == (expected.width, expected.width)
        assert site.mask.describe() == expected.masks[i]
        assert site.scale == pytest.approx(expected.scale, rel=1e-12)
        assert site.softcap == expected.softcap
        assert site.rotary_dim == expected.rotary_dim
        assert site.position == expected.position
        assert site.prescaled == pytest.approx(expected.prescaled, rel=1e-12)
        assert site.qk_norm is expected.qk_norm
        assert site.spelling == case[1]


def test_projections(case):
    expected = ZOO[case[0]].expected
    for i, item in enumerate(found(*case).result.matches):
        projections = item.site.projections
        assert projections is not None
        assert set(projections) == {"query", "key", "value", "output"}
        for name in ("query", "key", "value"):
            assert projections[name].fused is expected.fused
            assert projections[name].module.startswith(expected.owner.format(i))


def test_the_stream_behind_the_projections(case):
    """`hidden` is the (batch, token, channel) tensor that all three projections read."""
    here = found(*case)
    values = values_of(here.captured, ZOO[case[0]].inputs())
    for item in here.result.matches:
        if case[0] == "torch-encoder":  # it reads (token, batch, channel)
            assert (item.site.hidden_dim, item.nodes.hidden) == (0, None)
            continue
        assert item.site.hidden_dim == 64
        assert item.nodes.hidden is not None
        hidden, query = values[item.nodes.hidden], item.nodes.query
        sizes = dict(zip(query.layout.dims, values[query.node].shape, strict=True))
        assert hidden.shape[1:] == (sizes[("token",)], 64)
        assert sizes.get(("batch",), hidden.shape[0]) == hidden.shape[0]


def test_description_alone_rebuilds_the_core(case):
    """The independent check: what the site says must compute what the graph computes."""
    here = found(*case)
    inputs = ZOO[case[0]].inputs()
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 9:] = 0
    values = values_of(here.captured, inputs)
    for item in here.result.matches:
        heads = {"head": item.site.heads.query}
        wanted = canonical(values[item.nodes.output.node], item.nodes.output, heads)
        torch.testing.assert_close(
            core_from_description(item, values), wanted, atol=2e-6, rtol=1e-5
        )


def test_region_lies_in_the_owner_and_ends_at_the_output(case):
    for item in found(*case).result.matches:
        nodes = item.nodes
        assert nodes.output.node in nodes.region
        assert nodes.region.isdisjoint({nodes.query.node, nodes.key.node, nodes.value.node})
        assert nodes.region.isdisjoint({t.node for t in nodes.terms})
        assert all(module_path(n).startswith(item.site.fqn) for n in nodes.region)


def test_sites_serialise(case):
    for item in found(*case).result.matches:
        assert AttentionSite.from_json(item.site.to_json()) == item.site


def test_identical_layers_share_a_fingerprint(case):
    first, second = (m.site.fingerprint for m in found(*case).result.matches)
    assert len(first) == 64
    assert first == second


def test_dropout_of_a_training_model():
    module = ZOO["bert"].build("eager").train()
    captured = capture(module, (), ZOO["bert"].inputs())
    assert isinstance(captured, Captured)
    assert [m.site.dropout for m in match(captured).matches] == [0.1, 0.1]


def test_fingerprints_tell_architectures_apart():
    prints = {found(n, "eager").result.matches[0].site.fingerprint for n in ("bert", "gpt2")}
    assert len(prints) == 2


def test_a_router_is_refused_with_its_module():
    for miss in found("mixtral", "sdpa").result.misses:
        assert "follows a projection" in miss.reason
        assert miss.source.module.endswith("mlp.gate")
