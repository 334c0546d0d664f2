"""In half precision a deep model differs from itself: no more is asked of the rewritten one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from tiny_models import GROUPED, sharpen
from torch import nn

import rewriter
from rewriter.ir.contract import ContractResult
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise import Target
from rewriter.passes.verify.exact import check_exact
from rewriter.passes.verify.whole import check_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 16})
    return sharpen(hf.LlamaForCausalLM(config), 12.0).to(torch.bfloat16).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 13), generator=torch.Generator().manual_seed(1))


def examples() -> Examples:
    call = Call((), {"input_ids": ids(), "use_cache": False})
    return Examples(call, call, cached=True, padded="attention_mask", tokens="input_ids",
                    vocabulary=100)  # fmt: skip


def failed(results: list[ContractResult]) -> set[str]:
    return {r.check for r in results if r.outcome == "fail"}


def test_a_deep_model_is_rewritten(model: nn.Module) -> None:
    exact = rewriter.rewrite(model, "exact")
    report = rewriter.report_of(exact)
    drift = [c for c in report.contracts if "prefill then single" in c.check]
    assert drift and "the original model itself" in drift[0].detail


def test_a_model_that_equals_itself_as_badly_as_the_original_passes(model: nn.Module) -> None:
    results = list(check_model(model, copy.deepcopy(model), examples(), causal=True))
    assert failed(results) == set()
    beyond = [r for r in results if r.measured is not None and r.measured > 2e-2]
    assert beyond, "the model is too shallow to show anything"


def test_a_wrong_model_is_caught(model: nn.Module) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
            out = self.inner(input_ids, **kwargs)
            out.logits = out.logits + out.logits.mean(1, keepdim=True)
            return out

    found = failed(list(check_model(model, Wrong(), examples(), causal=True)))
    assert "later tokens change no earlier output" in found


@pytest.mark.parametrize(("factor", "fails"), [(1.0, False), (1.04, True)])
def test_a_projection_that_is_four_percent_off(
    model: nn.Module, factor: float, fails: bool
) -> None:
    rewritten = rewriter.rewrite(model, "exact", verify="none")
    site = rewriter.report_of(rewritten).sites[0]
    output = rewritten.get_submodule(f"{site.fqn}.o_proj")  # the weight itself is shared
    output.weight = nn.Parameter(output.weight.detach() * factor)
    results = list(check_exact(model, rewritten, [Target(site, "fused", {})], examples()))
    assert bool(failed(results)) == fails


@pytest.mark.parametrize(("factor", "fails"), [(1.0, False), (1.0003, True)])
def test_float32_that_rounds_is_held_against_float64(factor: float, fails: bool) -> None:
    """Gradients that nearly cancel differ by the order of sums alone; a wrong weight is caught."""
    torch.manual_seed(0)
    plain = sharpen(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), 100.0).eval()
    rewritten = rewriter.rewrite(plain, {"rules": [{"use": "keep"}]}, verify="none")
    site = rewriter.report_of(rewritten).sites[0]
    owner = rewritten.get_submodule(site.fqn)

    class Ordered(nn.Module):
        """The same sums in another order."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight = inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                x[..., ::2] @ self.weight[:, ::2].t() + x[..., 1::2] @ self.weight[:, 1::2].t()
            ) * factor

    owner.q_proj = Ordered(owner.q_proj)
    (result,) = check_exact(plain, rewritten, [Target(site, "fused", {})], examples())
    assert (result.outcome == "fail") == fails
    assert "fp64" in result.detail
