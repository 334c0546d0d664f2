"""Attention weights of eager models are formed when somebody reads them, and not before."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers as t
from mixer_sites import float_mask, make_site, qkv
from torch import Tensor, nn
from transformers import DynamicCache

import rewriter
from rewriter.mixers.exact.deferred import DeferredTensor
from rewriter.mixers.exact.fused import Fused, FusedOptions
from rewriter.mixers.exact.keep import Keep, KeepOptions

pytestmark = pytest.mark.usefixtures("generated_kernels")

N = 37


def eager_pair(layer: int | None = None) -> tuple[Fused, Keep]:
    site = make_site(heads=(4, 2, 16), spelling="eager")
    return Fused(site, FusedOptions(), layer).eval(), Keep(site, KeepOptions(), layer).eval()


def inputs() -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    q, k, v = qkv(make_site(heads=(4, 2, 16)), N)
    mask = torch.ones(N, N, dtype=torch.bool).tril()[None, None].expand(2, 1, N, N)
    return (q, k, v), (float_mask(mask),)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the original operations ran."""
    calls: list[int] = []
    original = Keep._eager

    def spy(self: Keep, *args: Any) -> Any:
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(Keep, "_eager", spy)
    return calls


def test_weights_that_nobody_reads_are_not_formed(formed: list[int]) -> None:
    fused, keep = eager_pair()
    tensors, terms = inputs()
    with torch.no_grad():
        out, weights = fused(*tensors, terms, need_weights=True)
    assert isinstance(weights, DeferredTensor) and weights is not None
    assert weights.shape == (2, 4, N, N) and weights.dtype == torch.float32
    assert weights.size(-1) == N and weights.dim() == 4 and not weights.requires_grad
    assert weights.device.type == "cpu" and len(weights) == 2 and not formed
    expected = keep(*tensors, terms, need_weights=True)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(weights, expected[1])


READINGS: dict[str, Any] = {
    "operation": lambda w: w + 0,
    "operation on the right": lambda w: torch.zeros_like(w) + w,
    "list": lambda w: torch.cat([w, w])[:2],
    "index": lambda w: w[:],
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "copy": copy.deepcopy,
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "matmul": lambda w: w @ torch.eye(N),
}


@pytest.mark.parametrize("reading", READINGS)
def test_reading_in_any_way(reading: str) -> None:
    fused, keep = eager_pair()
    tensors, terms = inputs()
    with torch.no_grad():
        weights = fused(*tensors, terms, need_weights=True)[1]
        expected = keep(*tensors, terms, need_weights=True)[1]
    got = READINGS[reading](weights)
    assert type(got) is Tensor and torch.equal(got, expected)


def test_they_can_be_saved() -> None:
    fused, keep = eager_pair()
    tensors, terms = inputs()
    with torch.inference_mode():
        weights = fused(*tensors, terms, need_weights=True)[1]
    file = io.BytesIO()
    torch.save({"weights": weights}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weights"], keep(*tensors, terms, need_weights=True)[1])


def test_a_cache_that_grows_does_not_change_them() -> None:
    fused, keep = eager_pair(layer=0)
    tensors, terms = inputs()
    cache = DynamicCache()
    with torch.no_grad():
        weights = fused(*tensors, terms, cache, need_weights=True)[1]
        fused(*(x[:, :, -1:] for x in tensors), (None,), cache)
    assert isinstance(weights, DeferredTensor)
    assert torch.equal(weights, keep(*tensors, terms, need_weights=True)[1])


def test_a_changed_source_is_an_error() -> None:
    fused, _ = eager_pair()
    tensors, terms = inputs()
    with torch.no_grad():
        weights = fused(*tensors, terms, need_weights=True)[1]
        tensors[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        weights.sum()


def test_with_gradients_and_in_training_they_are_formed(formed: list[int]) -> None:
    fused, keep = eager_pair()
    tensors, terms = inputs()
    outs = []
    for core in (fused, keep):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, weights = core(*leaves, terms, need_weights=True)
        assert type(weights) is Tensor
        outs.append(torch.autograd.grad(out.square().sum() + weights.square().sum(), leaves))
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
    assert formed == [1, 1]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    config = t.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, sliding_window=9, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.MistralForCausalLM(config).eval()
    return model, rewriter.rewrite(model, "exact", verify="none")


def test_a_windowed_eager_model_runs_on_the_kernels(
    models: tuple[nn.Module, nn.Module], formed: list[int]
) -> None:
    model, ours = models
    ids = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = ours(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not formed


def test_whoever_asks_a_model_gets_them(models: tuple[nn.Module, nn.Module]) -> None:
    ids = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    kept: list[list[Tensor]] = []
    for m in models:
        mine: list[Tensor] = []
        hook = m.model.layers[1].self_attn.register_forward_hook(
            lambda _m, _a, out, mine=mine: mine.append(out[1] * 1)
        )
        with torch.no_grad():
            attentions = m(input_ids=ids, output_attentions=True).attentions
        hook.remove()
        kept.append([*attentions, *mine])
    assert len(kept[0]) == len(kept[1]) == 3
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    asked = {"max_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    theirs, mine = (m.generate(ids[:1], do_sample=False, **asked) for m in models)
    for a, b in zip(theirs.attentions, mine.attentions, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
