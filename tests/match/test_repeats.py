"""Repeated modules are captured once, and the graph is the one that a full capture gives."""

from __future__ import annotations

import pytest
import torch
from graph_lines import graph_lines
from tiny_models import CAUSAL, EAGER_ONLY, ENCODERS, build
from torch import nn

from rewriter.passes.capture import Captured, capture
from rewriter.passes.examples import examples_for
from rewriter.passes.match import match
from rewriter.passes.repeats import repeated


class Block(nn.Module):
    """Attention without a mask and a small network; everything may be bent by arguments."""

    def __init__(self, index: int = 0, scale: float = 0.5) -> None:
        super().__init__()
        self.index, self.scale = index, scale
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) * self.scale).softmax(-1)
        x = x + self.out(weights @ v)
        if gate is not None:
            x = x * gate
        return x + self.mlp(x)


class Stack(nn.Module):
    """Blocks in a row; every second one with a gate."""

    def __init__(self, blocks: list[nn.Module], gated: bool = False) -> None:
        super().__init__()
        self.blocks, self.gated = nn.ModuleList(blocks), gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = (x.mean(1, keepdim=True).sigmoid(), x.amax(1, keepdim=True).tanh())
        for number, block in enumerate(self.blocks):
            x = block(x, gates[number % 2]) if self.gated else block(x)
        return x


def calls(model: nn.Module) -> list:
    return [((torch.randn(2, 7, 8),), {}), ((torch.randn(3, 11, 8),), {})]


def groups(model: nn.Module) -> set[tuple[str, ...]]:
    return set(repeated(model.eval(), calls(model)))


def both(model: nn.Module) -> tuple[Captured, Captured]:
    (args, kwargs), resized = calls(model)
    full = capture(model, args, kwargs)
    fast = capture(model, args, kwargs, resized=resized)
    assert isinstance(full, Captured)
    assert isinstance(fast, Captured)
    return full, fast


def assert_equal_graphs(full: Captured, fast: Captured) -> None:
    assert graph_lines(fast) == graph_lines(full)
    sites = [[m.site.to_json() for m in match(c).matches] for c in (full, fast)]
    for one, two in zip(*sites, strict=True):
        one["source"].pop("node"), two["source"].pop("node")
        assert one == two


def test_equal_layers_are_one_group_and_the_graph_is_the_full_one() -> None:
    model = Stack([Block(i) for i in range(3)], gated=True).eval()
    assert groups(model) == {("blocks.0", "blocks.1", "blocks.2")}
    full, fast = both(model)
    assert_equal_graphs(full, fast)
    assert len(match(fast).matches) == 3
    x = torch.randn(4, 5, 8)
    tensors = {**fast.constants}
    for name in fast.parameters:
        tensors[name] = fast.parameter(name)
    names = [n.name for n in fast.graph_module.graph.find_nodes(op="placeholder")]
    (got,) = fast.graph_module(*(tensors.get(name, x) for name in names))
    assert torch.equal(got, model(x))


def test_other_constants_are_another_group() -> None:
    model = Stack([Block(scale=s) for s in (0.5, 0.25, 0.5, 0.25)])
    assert groups(model) == {("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")}
    assert_equal_graphs(*both(model.eval()))


class ScaledByIndex(Block):
    """Divides by the layer's number, as some models do: equal parts inside unequal layers."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x / float(self.index + 1), gate)


class Wide(ScaledByIndex):
    """With a part that is worth a record."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.mlp = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh())))


@pytest.mark.nightly
def test_unequal_layers_may_hold_equal_parts() -> None:
    model = Stack([Wide(i) for i in range(2)])
    assert groups(model) == {("blocks.0.mlp", "blocks.1.mlp")}
    assert_equal_graphs(*both(model.eval()))


class LengthInDisguise(Block):
    """A constant that equals the first example's length: only the second size tells."""

    def __init__(self, fixed: int | None) -> None:
        super().__init__()
        self.fixed = fixed

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, gate) * (self.fixed or x.shape[1])


def test_a_constant_that_equals_a_size_is_told_apart() -> None:
    model = Stack([LengthInDisguise(None), LengthInDisguise(7)])
    assert groups(model) == set()


class Remembers(Block):
    """Keeps its weights in an attribute, which another module may read."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        self.seen = x.softmax(-1)
        return super().forward(x, gate)


class ReadsValues(Block):
    """Looks at the values of its parameters."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, gate) * float(self.out.bias.detach().sum().item() > 1e9)


@pytest.mark.parametrize("block", [Remembers, ReadsValues])
def test_what_a_record_cannot_show_is_captured_in_full(block: type[nn.Module]) -> None:
    assert groups(Stack([block(), block()])) == set()


def test_results_that_leave_through_a_hook_exclude_the_module() -> None:
    model = Stack([Block(), Block()])
    kept: list[torch.Tensor] = []
    model.blocks[1].out.register_forward_hook(lambda *a: kept.append(a[-1]) or None)
    model.blocks[0].out.register_forward_hook(lambda *a: kept.append(a[-1]) or None)
    model.register_forward_hook(lambda *a: a[-1] + kept.pop())
    assert groups(model) == set()


def test_shared_modules_and_parameters_exclude_themselves() -> None:
    block = Block()
    assert groups(Stack([block, block])) == set()
    tied = [Block(), Block()]
    tied[1].out.weight = tied[0].out.weight
    assert groups(Stack(tied)) == set()


def test_watching_changes_neither_buffers_nor_random_state() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()) for _ in range(2)))
    before = [b.clone() for b in model.train().buffers()]
    x = torch.randn(4, 8)
    state = torch.random.get_rng_state()
    repeated(model, [((x,), {})])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


NAMES = [
    (name, implementation)
    for name in (*CAUSAL, *ENCODERS)
    for implementation in ("sdpa", "eager")
    if not (name in EAGER_ONLY and implementation == "sdpa")
]


@pytest.mark.nightly  # by day the models of attention_zoo.py are captured so
@pytest.mark.parametrize(("name", "implementation"), NAMES)
def test_models_give_the_graph_of_a_full_capture(name: str, implementation: str) -> None:
    model = build(name, implementation)
    examples = examples_for(model)
    args, kwargs = examples.primary.args, examples.primary.kwargs
    full = capture(model, args, kwargs)
    resized = (examples.resized.args, examples.resized.kwargs)
    fast = capture(model, args, kwargs, resized=resized)
    assert isinstance(full, Captured)
    assert isinstance(fast, Captured)
    assert_equal_graphs(full, fast)
