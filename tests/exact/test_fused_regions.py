"""Gated MLP blocks and normalisations: found in the graph, fused in place, left when watched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter.backends import fastest
from rewriter.backends.cpu.target import cpu_flags
from rewriter.errors import UsageError
from rewriter.passes.capture import Captured, capture
from rewriter.passes.exact import fused, gated, norms
from rewriter.passes.match.mlp import match_mlps
from rewriter.plan import FusedModule, Plan


@pytest.fixture(autouse=True, scope="module")
def always() -> Iterator[None]:
    """Generated code counts as faster on any number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        if not {"amx_tile", "amx_bf16"} <= cpu_flags():
            if not {"avx2", "fma"} <= cpu_flags():
                pytest.skip("this processor has no AVX2 to emulate tiles on")
            patch.setenv("ATTENTION_REWRITER_ISA", "tiles_on_avx2")
        patch.setattr(fused, "PROBED_ROWS", (1,))
        patch.setattr(fused, "gains_of", lambda *_: {"1": 2.0})
        patch.setattr(fastest, "seconds", lambda weight, rows: (0.5, 1.0))
        yield


class Gemma(nn.Module):
    """A norm whose weight counts from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + self.scale.float())).type_as(x)


class NoNorm(nn.Module):
    """The mean is of the absolute values, which no kernel computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-6)


class Halves(nn.Module):
    """Gate and up projection in one weight, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.back(F.gelu(gate, approximate="tanh") * up)


class Separate(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.act, self.down = activation, nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.LayerNorm(16), Gemma(16), NoNorm()
        self.halves, self.silu = Halves(), Separate(nn.SiLU())
        self.exact = Separate(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.halves(self.first(x))
        x = x + self.silu(self.second(x))
        return x + self.exact(self.third(x))


def found_in(model: nn.Module) -> list[FusedModule]:
    captured = capture(model, (torch.randn(2, 5, 16),))
    assert isinstance(captured, Captured)
    sites = [m.site for m in match_mlps(captured).matches]
    return [*gated.find(model, sites), *norms.find(captured, model)]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


@pytest.fixture
def changed(blocks: Blocks) -> Blocks:
    copied = copy.deepcopy(blocks)
    layers = found_in(blocks)
    gated.apply(copied, layers)
    norms.apply(copied, layers)
    return copied


def test_regions_are_found_and_others_left_with_a_reason(blocks: Blocks) -> None:
    found = {x.fqn: x for x in found_in(blocks)}
    planned = {name for name, x in found.items() if x.status == "planned"}
    assert planned == {"halves", "silu", "first", "second"}
    assert found["second"].facts["form"]["offset"] == 1.0
    assert found["first"].facts["form"]["centred"] and found["first"].facts["bias"] == "bias"
    assert "gelu" in str(found["exact"].reason) and "differs" in str(found["third"].reason)


def test_changed_modules_are_the_same_function_with_the_same_keys(
    blocks: Blocks, changed: Blocks
) -> None:
    assert list(changed.state_dict()) == list(blocks.state_dict())
    assert isinstance(changed.silu, fused.Fused) and isinstance(changed.silu, Separate)
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), blocks(x), rtol=1e-4, atol=1e-5)
        for name in ("halves", "silu", "first", "second"):
            module = getattr(changed, name)
            assert module.__dict__[fused.STATE].fits(module, x)
    grads = [
        torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (changed, blocks)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["silu", "second"])
def test_copies_pickles_exports_and_casts(changed: Blocks, name: str) -> None:
    module, x = getattr(changed, name), torch.randn(3, 7, 16)
    with torch.no_grad():
        wanted = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert isinstance(other, fused.Fused) and torch.equal(other(x), wanted)
        program = torch.export.export(module, (x,), strict=False)
        assert not any("attention_rewriter" in str(n.target) for n in program.graph.nodes)
        assert copy.deepcopy(module).double()(x.double()).dtype == torch.float64
        for p in module.parameters():
            p.mul_(2)
        torch.testing.assert_close(module(x), super(fused.Fused, module).forward(x))


def test_watched_or_exchanged_insides_run(changed: Blocks) -> None:
    x = torch.randn(3, 7, 16)
    seen: list[int] = []
    with torch.no_grad():
        handle = changed.silu.act.register_forward_hook(lambda *_: seen.append(1))
        changed.silu(x)
        handle.remove()
        changed.silu(x)
        assert len(seen) == 1
        changed.silu.act = nn.ReLU()
        expected = changed.silu.down(changed.silu.gate(x).relu() * changed.silu.up(x))
        torch.testing.assert_close(changed.silu(x), expected)
        dropped = changed.halves.train()
        assert torch.equal(dropped(x), super(fused.Fused, dropped).forward(x))


def test_a_plan_of_another_model_is_refused(changed: Blocks) -> None:
    layers = found_in(Blocks().eval())
    with pytest.raises(UsageError, match="fused already"):
        gated.apply(changed, layers)
    with pytest.raises(UsageError, match="does not have"):
        norms.apply(nn.Linear(2, 2), layers)


def test_a_whole_model_with_the_policy_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**tiny_models.GROUPED, "num_hidden_layers": 1})
    model = hf.LlamaForCausalLM(config).eval()
    ours = rewriter.rewrite(model, "exact", verify="none")
    plan = rewriter.plan_of(ours)
    assert [(x.fqn, x.status) for x in plan.fused] == [
        ("model.layers.0.mlp", "done"),
        ("model.layers.0.input_layernorm", "done"),
        ("model.layers.0.post_attention_layernorm", "done"),
        ("model.norm", "done"),
    ]
    assert Plan.from_json(plan.to_json()) == plan
    checks = fused.results(plan.fused, torch.float32)
    assert [c.outcome for c in checks] == ["pass", "reported"] * 2
    ids = torch.randint(3, 100, (2, 9))
    ours.save_pretrained(tmp_path / "saved")
    again = rewriter.load(tmp_path / "saved")
    assert sum(isinstance(m, fused.Fused) for m in again.modules()) == 4
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_a_bfloat16_block_runs_whole_unless_its_inside_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Blocks().eval().bfloat16().silu
    region = gated.GatedRegion(
        *(gated.Side(name, False, (0, 24, 1), False) for name in ("gate", "up")),
        gated.Side("down", False, (0, 16, 1), True),
        "silu",
    )
    fused.put(model, region, {"1": 2.0})
    x = torch.randn(3, 30, 16).bfloat16()
    parts: list[int] = []
    product = gated.gated_linear

    def spy(*given: Any) -> Tensor:
        parts.append(1)
        return product(*given)

    monkeypatch.setattr(gated, "gated_linear", spy)
    with torch.no_grad():
        wanted = super(fused.Fused, model).forward(x)
        torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)
        assert not parts
        seen: list[Tensor] = []
        handle = model.down.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)
        handle.remove()
        assert len(parts) == 1 and seen[0].shape == (3, 30, 24)
        model(x[:1, :5])  # few rows
        assert len(parts) == 2


def test_many_rows_run_some_at_a_time(changed: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 16)
    seen: list[int] = []
    product = gated.gated_linear

    def spy(rows: Tensor, *rest: Any) -> Tensor:
        seen.append(rows.numel() // 16)
        return product(rows, *rest)

    monkeypatch.setattr(gated, "gated_linear", spy)
    with torch.no_grad():
        whole = changed.silu(x)
        monkeypatch.setattr(gated, "HIDDEN", 3 * 24 * 4)
        torch.testing.assert_close(changed.silu(x), whole)
        assert seen == [10, 3, 3, 2, 2]
        handle = changed.silu.down.register_forward_hook(lambda *_: None)
        changed.silu(x)  # somebody watches the projection: it runs once
        handle.remove()
    assert seen[-1] == 10


class Looped(Blocks):
    """All of it twice, with the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_a_block_that_runs_twice_is_one_region() -> None:
    torch.manual_seed(0)
    model = Looped().eval()
    names = [layer.fqn for layer in found_in(model)]
    assert len(names) == len(set(names))
