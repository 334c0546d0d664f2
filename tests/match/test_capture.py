"""Capture: any module with any arguments becomes one flat graph that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_zoo import ZOO, found, text
from tiny_models import VOCABULARY
from torch import fx, nn

from rewriter.ir.site import NearMiss
from rewriter.passes import torch_private
from rewriter.passes.capture import Captured, capture, module_path, source_of
from rewriter.passes.locate import find_softmax_modules
from rewriter.passes.match import match
from rewriter.passes.provenance import call_number


class Nested(nn.Module):
    """Tuples, None, flags, keyword arguments, no_grad and autocast regions, a repeated child."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x, pair, mask=None, double=False, **extra):
        with torch.no_grad():
            shift = pair[1].cos()
        with torch.autocast("cpu", enabled=False):
            x = self.proj(x) * pair[0]
        x = self.proj(x + shift)
        if double:
            x = 2 * x
        return (x if mask is None else x + mask), None, {"side": extra["bias"] + x.mean()}


@pytest.fixture(scope="module")
def nested():
    module = Nested()
    x, pair = torch.randn(2, 5, 8), (torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    kwargs = {"pair": pair, "mask": None, "double": True, "bias": torch.randn(2, 5, 8), "flag": "s"}
    captured = capture(module, (x,), kwargs)
    assert isinstance(captured, Captured), captured
    return module, captured


def test_inputs_are_named_by_their_path(nested):
    assert dict(nested[1].inputs) == {
        "args_0": "args.0",
        "pair_0": "kwargs.pair.0",
        "pair_1": "kwargs.pair.1",
        "bias": "kwargs.bias",
    }


def test_parameters_are_named_from_the_module(nested):
    assert sorted(nested[1].parameters.values()) == ["proj.bias", "proj.weight"]


def test_regions_are_flattened_and_calls_counted(nested):
    graph = nested[1].graph_module.graph
    assert not [n for n in graph.nodes if n.op == "get_attr"]
    linears = [n for n in graph.nodes if "linear" in str(n.target)]
    assert [module_path(n) for n in linears] == ["proj", "proj"]
    assert [call_number(n) for n in linears] == [0, 1]
    cos = next(n for n in graph.nodes if "cos" in str(n.target))
    assert cos.meta["no_grad"]
    assert module_path(cos) == ""
    assert source_of(cos).file == __file__


def test_graph_computes_the_same_at_other_sizes(nested):
    module, captured = nested
    x, pair = torch.randn(3, 7, 8), (torch.randn(1, 7, 8), torch.randn(1, 7, 8))
    bias = torch.randn(3, 7, 8)
    tensors = {"args_0": x, "pair_0": pair[0], "pair_1": pair[1], "bias": bias}
    args = [
        captured.parameter(n.name) if n.name in captured.parameters else tensors[n.name]
        for n in captured.graph_module.graph.find_nodes(op="placeholder")
    ]
    got = fx.Interpreter(captured.graph_module).run(*args)
    wanted = module(x, pair, double=True, bias=bias)
    torch.testing.assert_close(got[0], wanted[0])
    assert got[1] is None
    assert captured.out_spec is not None
    assert captured.out_spec.num_leaves == len(got)


def test_config_and_fast_path_are_restored():
    module = found("llama", "sdpa").module
    assert module.config.use_cache is True
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_owner_alone_gives_the_same_core(name, spelling):
    """The owner called with its own arguments: the mask is an input, the rest is as before."""
    here = found(name, spelling)
    site = here.result.matches[1].site
    owner = here.module.get_submodule(site.fqn)
    seen = {}
    hook = owner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    inputs = text()
    inputs["attention_mask"][1, 9:] = 0
    here.module(**inputs, use_cache=False)
    hook.remove()
    captured = capture(owner, seen["args"], seen["kwargs"])
    assert isinstance(captured, Captured), captured
    assert set(captured.parameters.values()) <= {n for n, _ in owner.named_parameters()}
    (item,) = match(captured).matches
    assert item.site.fqn == ""
    assert item.site.heads == site.heads
    assert item.site.score == site.score
    assert item.site.mask.opaque == "mask is an input of the captured module"
    assert (item.nodes.weights is not None) == (spelling == "eager")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x.softmax(-1)
        return torch.softmax(-x, -1)


def test_a_model_that_does_not_trace_is_a_near_miss(capfd):
    miss = capture(Branching(), (torch.ones(2, 3),))
    assert isinstance(miss, NearMiss)
    assert miss.stage == "capture"
    assert miss.source.module == "inner"
    assert miss.source.file == __file__
    assert not capfd.readouterr().err


def test_softmax_modules_without_tracing():
    assert find_softmax_modules(Branching(), (torch.ones(2, 3),)) == ("inner",)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    paths = ("layers.0.self_attn", "layers.1.self_attn")
    assert find_softmax_modules(encoder, (torch.ones(2, 3, 8),)) == paths
    ids = torch.randint(0, VOCABULARY, (2, 5))
    model = found("llama", "eager").module
    wanted = tuple(ZOO["llama"].expected.owner.format(i) for i in range(2))
    assert find_softmax_modules(model, (), {"input_ids": ids}) == wanted


def test_this_torch_is_one_that_was_tried():
    low, high = torch_private.TESTED_TORCH
    assert low <= torch_private.torch_version() < high


class Asks(nn.Module):
    """Clamps its hidden values where `ask` says so."""

    def __init__(self, ask: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.ask = nn.Linear(8, 8), ask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return x.clamp(-1e4, 1e4) if self.ask(x) else x


@pytest.mark.parametrize(
    ("ask", "captured"),
    [
        (lambda x: ~torch.isfinite(x).all(), False),  # another operator in between
        (lambda x: not torch.isfinite(x).all(), True),
        (lambda x: torch.isinf(x).any() or x.isnan().any(), True),
        (lambda x: torch.isnan(x).all(), False),  # not decided by finite values being usual
        (lambda x: (x > 0).all(), False),
    ],
)
def test_a_branch_on_finite_values_is_read_as_if_they_were(ask, captured: bool) -> None:
    x = torch.randn(2, 5, 8)
    assert isinstance(capture(Asks(ask), (x,)), NearMiss)
    found = capture(Asks(ask), (x,), assume_finite=True)
    assert isinstance(found, Captured) == captured
    if isinstance(found, Captured):
        assert not [n for n in found.graph_module.graph.nodes if "clamp" in n.name]
