"""MLP blocks in every spelling are found with the right facts; look-alikes are refused."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from core_oracle import values_of
from mlp_oracle import mlp_from_description
from mlp_parts import TOKENS, WIDTH, Body, Side, Written
from mlp_spellings import FOUND, REFUSED, halves, tanh_by_hand
from torch import fx
from transformers.activations import ACT2FN

from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import NearMiss
from rewriter.passes.capture import Captured, capture
from rewriter.passes.match.mlp import MlpMatch, MlpResult, match_mlps

X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@cache
def found() -> tuple[Captured, MlpResult]:
    return _look(tuple(FOUND))


@cache
def refused() -> tuple[Captured, MlpResult]:
    return _look(tuple(REFUSED))


def _look(bodies: tuple[Body, ...], training: bool = False) -> tuple[Captured, MlpResult]:
    torch.manual_seed(0)
    captured = capture(Side(bodies).train(training), (X,))
    assert isinstance(captured, Captured), captured.describe()
    return captured, match_mlps(captured)


@cache
def run() -> dict[fx.Node, Any]:
    return values_of(found()[0], {"args.0": X})


def matches_of(result: MlpResult, number: int) -> list[MlpMatch]:
    prefix = f"parts.{number}"
    return [m for m in result.matches if f"{m.site.fqn}.".startswith(f"{prefix}.")]


def misses_of(result: MlpResult, number: int) -> list[NearMiss]:
    prefix = f"parts.{number}"
    return [m for m in result.misses if f"{m.source.module}.".startswith(f"{prefix}.")]


@pytest.mark.parametrize("body", FOUND, ids=lambda f: f.__name__)
def test_found_with_its_facts(body):
    says, number = FOUND[body], list(FOUND).index(body)
    items = matches_of(found()[1], number)
    assert len(items) == says.sites
    assert not misses_of(found()[1], number)
    for item in items:
        site = item.site
        assert site.activation.name == says.activation
        assert site.activation.scale == pytest.approx(says.scale, rel=1e-6)
        assert site.kind == says.kind
        assert site.gate_layout == says.layout
        assert site.up.rows == says.up
        assert (site.gate.rows if site.gate is not None else None) == says.gate
        assert (site.input, site.hidden, site.output) == says.widths
        assert site.experts == says.experts
        assert MlpSite.from_json(site.to_json()) == site


@pytest.mark.parametrize("body", FOUND, ids=lambda f: f.__name__)
def test_description_alone_rebuilds_the_block(body):
    """The independent check: what the site says must compute what the graph computes."""
    captured, result = found()
    for item in matches_of(result, list(FOUND).index(body)):
        if not item.site.activation.opaque:
            values = run()
            wanted = values[item.nodes.output]
            got = mlp_from_description(item, captured, values)
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("body", REFUSED, ids=lambda f: f.__name__)
def test_look_alikes_are_refused_with_a_reason(body):
    result, reason, number = refused()[1], REFUSED[body], list(REFUSED).index(body)
    misses = misses_of(result, number)
    assert not matches_of(result, number)
    if reason is not None:
        assert any(reason in m.reason for m in misses), [m.reason for m in misses]
        places = [inspect.getsourcelines(f) for f in (body, Written.forward)]
        for miss in misses:
            assert any(miss.source.line in range(n, n + len(lines)) for lines, n in places)
    else:
        assert not misses


NAMES = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "quick_gelu": "quick_gelu",
    "gelu_10": "gelu_10", "silu": "silu", "swish": "silu", "mish": "mish", "relu": "relu",
    "relu2": "relu2", "relu6": "relu6", "tanh": "tanh", "sigmoid": "sigmoid",
    "leaky_relu": "leaky_relu", "laplace": "laplace",
}  # fmt: skip


def test_every_activation_in_use_gets_its_name():
    bodies = [_plain(ACT2FN[name]) for name in NAMES] + [_gated(ACT2FN[name]) for name in NAMES]
    result = _look(tuple(bodies))[1]
    assert [m.site.activation.name for m in result.matches] == [*NAMES.values(), *NAMES.values()]
    for item in result.matches[len(NAMES) :]:
        assert item.site.gate is not None
        assert item.site.gate.weight.endswith(".gate.weight")


def _plain(activation):
    return lambda m, x: m.down(activation(m.up(x)))


def _gated(activation):
    return lambda m, x: m.down(m.up(x) * activation(m.gate(x)))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_a_fact_in_training_and_evaluation(training):
    def body(m, x):
        return m.down(torch.nn.functional.dropout(m.up(x).relu(), 0.25, m.training))

    (item,) = _look((body,), training)[1].matches
    assert item.site.dropout == 0.25
    assert item.site.activation.name == "relu"


def test_half_precision_is_named_alike():
    captured = capture(Side([tanh_by_hand]).bfloat16(), (X.bfloat16(),))
    assert isinstance(captured, Captured)
    (item,) = match_mlps(captured).matches
    assert item.site.activation.name == "gelu_tanh"


def test_weights_need_not_exist():
    """Weights on the meta device are enough: only probe values are computed with."""
    captured = capture(Side([halves]).to("meta"), (X.to("meta"),))
    assert isinstance(captured, Captured)
    (item,) = match_mlps(captured).matches
    assert item.site.activation.name == "silu"
