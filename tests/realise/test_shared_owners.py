"""Modules that compute several attention blocks, and modules that run several times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import BODY, sharpen
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

import rewriter
from rewriter.distill import DistillConfig, LayerStage
from rewriter.distill.copies import core_names
from rewriter.distill.data import Rows
from rewriter.distill.match_layers import MatchLayers
from rewriter.errors import NoSiteError, UnsupportedError, UsageError, VerificationError
from rewriter.mixers.base import Mixer
from rewriter.passes.examples import examples_for
from rewriter.passes.realise import apply_plan

WINDOW = {"use": "sink_window", "options": {"window": 3, "sinks": 1}}
LEARNED = {"use": "hedgehog"}
ALBERT_LAYER = "encoder.albert_layer_groups.0.albert_layers.0.attention"


def policy(*rules: Any) -> dict[str, Any]:
    return {"rules": list(rules)}


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


class SelfAndCross(nn.Module):
    """Causal self attention and attention to a source, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.ask, self.given, self.back = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        own = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(own.transpose(1, 2).flatten(2))
        k, v = (heads(t) for t in self.given(source).chunk(2, -1))
        scores = heads(self.ask(x)) @ k.mT * 8**-0.5
        crossed = scores.softmax(-1) @ v
        return x + self.back(crossed.transpose(1, 2).flatten(2))


class Causal(nn.Module):
    """Attention over earlier tokens, or over all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, causal: bool = True) -> torch.Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Universal(nn.Module):
    """One layer that runs three times; `causal` says how in each run."""

    def __init__(self, causal: tuple[bool, ...] = (True, True, True)) -> None:
        super().__init__()
        self.layer, self.causal = Causal(), causal
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for causal in self.causal:
            x = self.norm(self.layer(x, causal))
        return x


def made(model: nn.Module) -> Any:
    return sharpen(model).eval()


@pytest.fixture
def stream() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 11, 32), torch.randn(2, 7, 32)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def albert(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = hf.AlbertConfig(
        **{**BODY, "num_hidden_layers": 3},
        embedding_size=16,
        attn_implementation=request.param,
    )
    return made(hf.AlbertModel(config))


def window_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal window of three tokens and one sink, over all pairs."""
    near = torch.ones(q.shape[-2], q.shape[-2]).tril().triu(-2).bool()
    near[:, 0] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def test_identity_of_several_blocks_is_exact(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = made(SelfAndCross())
    result = rewriter.rewrite(model, "identity", stream, verify="quick")
    x, source = stream
    assert torch.equal(result(x, source), model(x, source))
    assert torch.equal(result(x[:1, :5], source[:1, :3]), model(x[:1, :5], source[:1, :3]))
    assert sorted(dict(result.core.named_children())) == ["0", "1"]


def test_each_block_of_a_module_gets_its_own_mixer(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    model = made(SelfAndCross())
    window = policy({**WINDOW, "kind": "causal"})
    result = rewriter.rewrite(model, window, stream, verify="full", force=True)
    x, source = stream
    q, k, v = (heads(t) for t in model.qkv(x).chunk(3, -1))
    mid = x + model.out(window_by_hand(q, k, v).transpose(1, 2).flatten(2))
    k, v = (heads(t) for t in model.given(source).chunk(2, -1))
    crossed = F.scaled_dot_product_attention(heads(model.ask(mid)), k, v)
    expected = mid + model.back(crossed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(result(x, source), expected, rtol=1e-5, atol=1e-5)
    names = [m.info.name for m in result.modules() if isinstance(m, Mixer)]
    assert names == ["sink_window", "keep"]
    gaps = [c.subject for c in rewriter.report_of(result).contracts if c.number == 9]
    assert "the model, block 1 of 2" in gaps


def test_learned_parameters_of_a_block_are_saved_and_loaded(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    model = made(SelfAndCross())
    result = rewriter.rewrite(model, policy({**LEARNED, "kind": "causal"}), stream, verify="quick")
    new = [key for key in result.state_dict() if key not in model.state_dict()]
    assert new and all(key.startswith("core.0.") for key in new)
    with torch.no_grad():
        for name in core_names(result):
            result.get_parameter(name).add_(0.1)
    again = rewriter.rewrite(model, rewriter.plan_of(result), stream, verify="none")
    again.load_state_dict(result.state_dict())
    assert torch.equal(again(*stream), result(*stream))


@pytest.mark.parametrize("rule", [WINDOW, LEARNED], ids=["window", "learned"])
def test_a_module_that_runs_three_times_has_one_mixer(rule: Any) -> None:
    torch.manual_seed(1)
    model = made(Universal())
    x = torch.randn(2, 12, 32)
    result = rewriter.rewrite(model, policy(rule), (x,), verify="quick")
    decisions = rewriter.plan_of(result).decisions
    assert [d.status for d in decisions] == ["done"] * 3
    assert len([m for m in result.modules() if isinstance(m, Mixer)]) == 1
    if rule is WINDOW:
        expected = x
        for _ in range(3):
            q, k, v = (heads(t) for t in model.layer.qkv(expected).chunk(3, -1))
            out = window_by_hand(q, k, v).transpose(1, 2).flatten(2)
            expected = model.norm(expected + model.layer.out(out))
        torch.testing.assert_close(result(x), expected, rtol=1e-4, atol=1e-4)
    core = result.layer.core
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(UnsupportedError, match="runs 3 times for each token"):
        core(q, q, q, cache=DynamicCache())


def test_runs_that_compute_different_attention_are_refused() -> None:
    torch.manual_seed(1)
    model = made(Universal((True, False)))
    x = torch.randn(2, 12, 32)
    with pytest.raises(NoSiteError, match="its runs compute different attention"):
        rewriter.rewrite(model, "identity", (x,))


def test_runs_cannot_become_different_things() -> None:
    torch.manual_seed(1)
    model = made(Universal())
    x = torch.randn(2, 12, 32)
    some = policy({**WINDOW, "layers": [1]})
    plan, _ = rewriter.make_plan_for(model, some, (x,))
    assert [d.status for d in plan.decisions] == ["refused"] * 3
    assert "select all of its sites (0, 1, 2) or none" in str(plan.decisions[0].reason)
    edited = plan.model_copy(
        update={"decisions": [d.model_copy(update={"status": "planned"}) for d in plan.decisions]}
    )
    with pytest.raises(UsageError, match="all its runs need the same mixer"):
        rewriter.rewrite(model, edited, (x,))


def test_albert_identity_is_exact(albert: Any) -> None:
    result = rewriter.rewrite(albert, "identity", verify="quick")
    ids = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        expected = albert(ids, **kwargs).last_hidden_state
        assert torch.equal(result(ids, **kwargs).last_hidden_state, expected)
    assert len([m for m in result.modules() if isinstance(m, Mixer)]) == 1


@pytest.mark.parametrize("rule", [WINDOW, LEARNED], ids=["window", "learned"])
def test_albert_is_rewritten_saved_and_loaded(albert: Any, rule: Any, tmp_path: Path) -> None:
    result = rewriter.rewrite(albert, policy(rule), verify="quick")
    assert result.get_submodule(ALBERT_LAYER).core.info.name == rule["use"]
    ids = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in core_names(result):
            result.get_parameter(name).add_(0.1)
    result.save_pretrained(tmp_path / "out")
    again = rewriter.load(tmp_path / "out")
    assert torch.equal(again(ids).last_hidden_state, result(ids).last_hidden_state)
    ours, theirs = result(ids).last_hidden_state, albert(ids).last_hidden_state
    assert float((ours - theirs).detach().abs().max()) > 1e-3


def test_a_shared_layer_learns_from_all_its_runs(albert: Any) -> None:
    student = rewriter.rewrite(albert, policy(LEARNED), verify="none")
    config = DistillConfig(layers=LayerStage(steps=1, batch=1), dtype="float32")
    stage = MatchLayers(albert, student, config)
    calls: list[int] = []
    stage.owners[ALBERT_LAYER].register_forward_hook(lambda *_: calls.append(1))
    losses = stage.backward(Rows(torch.randint(3, 100, (1, 24))), 1.0)
    assert len(calls) == 3 and losses.total > 0.0
    assert all(float(p.grad.abs().max()) > 0.0 for p in stage.core.values() if p.grad is not None)


def test_a_module_that_runs_less_often_than_planned_is_no_crash() -> None:
    torch.manual_seed(1)
    model = made(Universal())
    x = torch.randn(2, 12, 32)
    plan, _ = rewriter.make_plan_for(model, "identity", (x,))
    shorter = made(Universal((True, True)))
    with pytest.raises(VerificationError, match="runs 2 times in one forward pass"):
        apply_plan(shorter, plan, examples_for(shorter, (x,)))
