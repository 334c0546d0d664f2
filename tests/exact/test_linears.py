"""Linear layers are found in the graph, changed in place, and stay the same layers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter.backends import fastest
from rewriter.errors import UsageError
from rewriter.passes.capture import Captured, capture
from rewriter.passes.exact import linears
from rewriter.plan import LinearLayer, Plan


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code counts as faster, so that every layer is changed."""
    monkeypatch.setattr(fastest, "seconds", lambda weight, rows: (0.5, 1.0))


class Odd(nn.Module):
    """A layer without a usual name, stored as (in, out), with its bias added by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 20) / 4)
        self.shift = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.shift, x.reshape(-1, 12), self.table)
        return flat.reshape(*x.shape[:-1], 20)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.odd = Odd()
        self.last = nn.Linear(20, 16, bias=False)
        self.activated = Activated(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_pre_hook(lambda *_: None)
        self.free = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.odd(self.first(x)))
        x = self.first.weight.t().mean() + self.hooked(self.activated(x))
        return F.linear(x, self.free)


def found_in(model: nn.Module) -> dict[str, LinearLayer]:
    captured = capture(model, (torch.randn(2, 5, 16),))
    assert isinstance(captured, Captured)
    return {x.fqn: x for x in linears.find(captured, model)}


@pytest.fixture(scope="module")
def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def changed(model: nn.Module) -> nn.Module:
    layers = found_in(model)
    copied = copy.deepcopy(model)
    linears.apply(copied, list(layers.values()))
    return copied


def test_layers_are_found_and_others_left_with_a_reason(mixed: Mixed) -> None:
    found = found_in(mixed)
    planned = {name for name, x in found.items() if x.status == "planned"}
    assert planned == {"first", "odd", "last"}
    assert (found["odd"].weight, found["odd"].bias, found["odd"].transposed) == (
        *("table", "shift"),
        True,
    )
    assert "relu" in str(found["activated"].reason)
    assert "hook" in str(found["hooked"].reason)
    assert all(x.error < 1e-6 for x in found.values())


def test_changed_layers_are_the_same_function_with_the_same_keys(mixed: Mixed) -> None:
    ours = changed(mixed)
    assert list(ours.state_dict()) == list(mixed.state_dict())
    assert isinstance(ours.first, linears.FasterLinear)
    assert type(mixed.first) is nn.Linear and isinstance(ours.first, nn.Linear)
    x = torch.randn(3, 7, 16)
    grads = []
    for model in (ours, mixed):
        out = model(x)
        grads.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_exports_work(mixed: Mixed) -> None:
    ours = changed(mixed)
    x = torch.randn(3, 7, 16)
    wanted = ours.first(x)
    for other in (copy.deepcopy(ours.first), pickle.loads(pickle.dumps(ours.first))):
        assert torch.equal(other(x), wanted)
    program = torch.export.export(ours.first, (x,), strict=False)
    names = {str(n.target) for n in program.graph.nodes}
    assert not any("attention_rewriter" in name for name in names)
    compiled = torch.compile(ours.first, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)


def test_another_weight_in_the_place_is_honoured(mixed: Mixed) -> None:
    ours = changed(mixed)
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        ours.first.weight.mul_(2)
        torch.testing.assert_close(ours.first(x), F.linear(x, ours.first.weight, ours.first.bias))
    half = copy.deepcopy(ours.first).half()
    assert half(x.half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.first(x).dtype == torch.bfloat16


def test_a_plan_of_another_model_is_refused(mixed: Mixed) -> None:
    with pytest.raises(UsageError, match="does not have"):
        linears.apply(copy.deepcopy(mixed), [LinearLayer(fqn="second")])


def test_what_is_not_faster_is_left(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "seconds", lambda weight, rows: (math.inf, 0.0))
    assert {x.status for x in found_in(mixed).values()} == {"refused"}


def test_code_with_other_values_is_left(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = linears.generated.forward
    monkeypatch.setattr(linears.generated, "forward", lambda *a: forward(*a) * 1.001)
    assert {x.status for x in found_in(mixed).values()} == {"refused"}


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny_models.GROUPED, "num_hidden_layers": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastest, "seconds", lambda weight, rows: (0.5, 1.0))
        yield model.eval(), rewriter.rewrite(model, "exact", verify="none")


def test_a_whole_model_with_the_policy_exact(llama: tuple[nn.Module, nn.Module]) -> None:
    model, ours = llama
    plan = rewriter.plan_of(ours)
    done = [x.fqn for x in plan.linears if x.status == "done"]
    assert len(done) == 8 and "lm_head" in done and "model.layers.0.self_attn.q_proj" in done
    assert Plan.from_json(plan.to_json()) == plan
    ids = torch.randint(3, 100, (2, 9))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_save_and_load_keep_the_layers(llama: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    llama[1].save_pretrained(tmp_path / "saved")
    again = rewriter.load(tmp_path / "saved")
    changed_ = [m for m in again.modules() if isinstance(m, linears.FasterLinear)]
    assert len(changed_) == 8
    ids = torch.randint(3, 100, (2, 9))
    assert torch.equal(again(ids).logits, llama[1](ids).logits)


@pytest.mark.nightly
def test_contracts_hold_for_changed_layers(llama: tuple[nn.Module, nn.Module]) -> None:
    ours = rewriter.rewrite(llama[0], "exact", verify="quick")
    checks = [c for c in rewriter.report_of(ours).contracts if "linear layers" in c.check]
    assert [c.outcome for c in checks] == ["pass", "reported"]
