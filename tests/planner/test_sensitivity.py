"""Sensitivities against direct computation on the model itself."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from rewriter.errors import UsageError
from rewriter.evaluate.quality import copy_rows
from rewriter.ir.site import AttentionSite
from rewriter.planner import Candidate, Probes
from rewriter.planner.sensitivity import Sensitivities, label_of, sensitivities

PROBES = Probes(passage=12, gap=(10, 10), skip=2)
WINDOW = Candidate("sink_window", {"window": 4, "sinks": 1})
WIDE = Candidate("sink_window", {"window": 99, "sinks": 1})


@pytest.fixture(scope="module")
def found(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> Sensitivities:
    return sensitivities(model, sites, [WINDOW, WIDE], stream, rows=1, probes=PROBES, heads=True)


def test_a_window_over_everything_changes_nothing(found: Sensitivities) -> None:
    for site in found.sites:
        for effect in (site.swap[label_of(WIDE)], site.restore[label_of(WIDE)]):
            assert abs(effect.kl) < 1e-5 and abs(effect.copy) < 1e-4
        assert site.gap[label_of(WIDE)] < 1e-5 < site.gap[label_of(WINDOW)]
        assert site.swap[label_of(WINDOW)].kl > 1e-6
    assert found.everywhere[label_of(WINDOW)].kl > 1e-6
    assert json.loads(json.dumps(found.to_json()))["sites"][1]["index"] == 1


def test_one_layer_s_restore_is_all_others_swapped(
    model: torch.nn.Module,
    sites: tuple[AttentionSite, ...],
    stream: torch.Tensor,
    found: Sensitivities,
) -> None:
    """With one site alone, its restore is the original and its swap is the window everywhere."""
    one = sensitivities(model, sites[:1], [WINDOW], stream, rows=1, probes=PROBES)
    label = label_of(WINDOW)
    assert one.sites[0].swap[label] == one.everywhere[label]
    assert abs(one.sites[0].restore[label].kl) < 1e-6
    assert one.sites[0].swap[label].kl == pytest.approx(found.sites[0].swap[label].kl, rel=1e-4)
    # one key/value head: a window in it is a window in the layer
    assert found.sites[0].head_swap[0].kl == pytest.approx(one.sites[0].swap[label].kl, rel=1e-3)


def test_statistics_are_those_of_the_model_s_own_weights(
    model: LlamaForCausalLM, stream: torch.Tensor, found: Sensitivities
) -> None:
    row = copy_rows(stream, 1, 12, 10, seed=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(row, output_attentions=True, output_hidden_states=True, use_cache=False)
    model.set_attn_implementation("sdpa")
    at = torch.arange(row.shape[1])
    near = (at[:, None] - at < 4) | (at < 1)
    for site, weights in zip(found.sites, out.attentions, strict=True):
        for head, statistics in enumerate(site.heads):
            w = weights[0, head].double()
            entropy = -(w * w.clamp_min(1e-300).log()).sum(-1).mean()
            assert statistics.entropy == pytest.approx(float(entropy), abs=1e-4)
            assert statistics.near == pytest.approx(float((w * near).sum(-1).mean()), abs=1e-5)
            repeats = torch.arange(22, 33)
            looked = w[repeats, repeats - 22 + 1].mean()
            assert statistics.retrieval == pytest.approx(float(looked), abs=1e-6)
            assert statistics.spread > 0
        assert site.similarity is not None and -1 <= site.similarity <= 1


def test_nothing_to_measure_is_said(
    model: torch.nn.Module, sites: tuple[AttentionSite, ...], stream: torch.Tensor
) -> None:
    with pytest.raises(UsageError, match="at least one candidate"):
        sensitivities(model, sites, [], stream)
    quick = sensitivities(model, sites, [WINDOW], stream, probes=PROBES, swaps=False)
    assert quick.everywhere == {} and quick.sites[0].swap == {} and quick.sites[0].gap
