from __future__ import annotations

import io
import json
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertModel

from rewriter.errors import InputError
from rewriter.evaluate import (
    SENTENCES,
    Measurement,
    QualityReport,
    branch_ablation,
    branches_of,
    embed,
    ratio,
    similarity_agreement,
    without_branch,
)
from rewriter.evaluate.encoder import pearson, spearman
from rewriter.evaluate.measurement import pooled, proportion
from rewriter.mixers.base import Mixer, MixerInfo


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        sums = rng.exponential(2.0, (40, 5)).sum(1)
        m = pooled("x", [(float(s), 5.0) for s in sums], tokens=200, transform="exp")
        inside += m.low <= math.exp(2.0) <= m.high
    assert 50 <= inside <= 60  # 95 % of 60 is 57, binomial spread 1.7, bootstrap a little narrow


def test_wilson_interval_known_values() -> None:
    half = proportion("x", [True] * 5 + [False] * 5)
    assert (half.low, half.high) == (
        pytest.approx(0.2366, abs=1e-4),
        pytest.approx(0.7634, abs=1e-4),
    )
    none = proportion("x", [False] * 10)
    assert none.low == 0.0 and none.high == pytest.approx(0.2775, abs=1e-4)


def test_ratio_is_paired() -> None:
    rng = np.random.default_rng(1)
    teacher = pooled(
        "p", [(float(x), 1.0) for x in rng.normal(3, 1, 20)], tokens=20, transform="exp"
    )
    student = pooled("p", [(a + 0.1, w) for a, w in teacher.units], tokens=20, transform="exp")
    over = ratio(student, teacher)
    # Row by row the student is exp(0.1) worse, whatever the row: no spread is left.
    for value in (over.value, over.low, over.high):
        assert value == pytest.approx(math.exp(0.1), rel=1e-9)
    with pytest.raises(ValueError, match="other samples"):
        ratio(student, pooled("p", teacher.units[:5], tokens=5, transform="exp"))


class Branching(Mixer):
    info: ClassVar[MixerInfo] = MixerInfo("b", "f", "distilled", "", "", "", frozenset({"causal"}))
    branches = ("near", "far")

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.disabled: frozenset[str] = frozenset()


class OneBranch(Branching):
    branches = ("far",)


def test_branch_ablation_is_model_wide_and_leaves_nothing_switched_off() -> None:
    model = nn.ModuleList([Branching(), nn.Linear(1, 1), OneBranch()])
    assert branches_of(model) == ["near", "far"]

    def metric(m: Any) -> Measurement:
        value = float(sum(len(x.disabled) for x in m if isinstance(x, Mixer)))
        return pooled("off", [(value, 1.0)], tokens=1)

    out = branch_ablation(model, metric)
    assert {k: v.value for k, v in out.items()} == {"nothing": 0.0, "near": 1.0, "far": 2.0}
    assert metric(model).value == 0.0
    with pytest.raises(RuntimeError), without_branch(model, "far") as count:
        assert count == 2
        raise RuntimeError
    assert metric(model).value == 0.0
    with pytest.raises(ValueError, match="no mixer"), without_branch(model, "middle"):
        pass


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, 7, elements=st.integers(-3, 3).map(float)))
def test_spearman_with_ties_equals_brute_force(values: Any) -> None:
    other = np.arange(7.0) ** 2
    ranks = np.array([np.mean([1 + sum(values < x), sum(values <= x)]) for x in values])
    expected = pearson(ranks, np.arange(1.0, 8.0))
    assert spearman(values, other) == pytest.approx(expected, nan_ok=True)
    if not math.isnan(expected):
        assert expected == pytest.approx(np.corrcoef(ranks, np.arange(7.0))[0, 1])


def test_similarity_agreement() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(30, 16))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    same = similarity_agreement(before, 3 * before @ rotation)
    assert same.pearson.value == pytest.approx(1.0) and same.spearman.low == pytest.approx(1.0)
    noisy = similarity_agreement(before, before + rng.normal(size=before.shape))
    assert noisy.pearson.low < noisy.pearson.value < noisy.pearson.high < 0.95
    unrelated = similarity_agreement(before, rng.normal(size=(30, 8)))
    assert unrelated.spearman.low < 0 < unrelated.spearman.high
    with pytest.raises(InputError, match="at least 3"):
        similarity_agreement(before[:2], before[:2])


def test_embeddings_are_means_over_tokens_without_padding() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertModel(config).train()

    class Words:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
            rows = [[len(w) for w in t.split()] for t in texts]
            width = max(map(len, rows))
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
            return {"input_ids": ids, "attention_mask": mask}

    texts = ["a bb ccc", "dddd", "ee f ggg hhhhh"]
    together = embed(model, Words(), texts, batch=2)
    assert model.training and together.shape == (3, 16)
    for text, row in zip(texts, together, strict=True):
        ids = torch.tensor([[len(w) for w in text.split()]])
        with torch.no_grad():
            hidden = model.eval()(ids).last_hidden_state[0].double().mean(0)
        np.testing.assert_allclose(row, hidden.numpy(), atol=1e-5)
    assert len(set(SENTENCES)) == 60


def test_report_as_json_and_table() -> None:
    def made(name: str, shift: float, better: Any = "low") -> Measurement:
        units = [(1.0 + shift, 1.0), (2.0 + shift, 1.0)]
        return pooled(name, units, tokens=2, transform="exp", better=better)

    rows = {
        model: {"perplexity": made("perplexity", s), "top-1": made("top-1", s, "high")}
        for model, s in (("teacher", 0.0), ("undistilled", 1.0), ("distilled", 0.1))
    }
    rows["distilled"]["pass key"] = proportion("pass key", [True, False])
    report = QualityReport(
        columns=rows,
        ablation={"nothing": rows["distilled"], "linear": rows["undistilled"]},
        ablated="distilled",
        notes=("Two rows only [not bold].",),
    )
    data = json.loads(json.dumps(report.to_json()))
    over = data["models"]["distilled"]["perplexity"]["over_teacher"]
    assert over["value"] == pytest.approx(math.exp(0.1))
    assert "over_teacher" not in data["models"]["teacher"]["perplexity"]
    assert "over_teacher" not in data["models"]["distilled"]["top-1"]
    assert data["ablation"]["without"]["linear"]["perplexity"]["samples"] == 2
    stream = io.StringIO()
    Console(file=stream, width=140).print(report.render())
    text = stream.getvalue()
    for piece in ("teacher", "undistilled", "1.105 x", "branch 'linear'", "[not bold]", "-"):
        assert piece in text
