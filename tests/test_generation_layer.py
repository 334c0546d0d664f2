"""Mixer states in transformers caches: tiny real models whose attention core is a mixer.

The cores are put in by hand, so this tests the cache layer alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rewriter.errors import UnsupportedError
from rewriter.generation import MixerCacheLayer, layer_of
from rewriter.ir.mask import Causal, KeyPadding, Mask, Window
from rewriter.ir.site import AddTerm, AttentionSite, FillTerm, HeadGroups, Scale, Source, Spelling
from rewriter.mixers.base import Mixer, MixerOptions
from rewriter.mixers.exact.keep import Keep, KeepOptions
from rewriter.mixers.hybrid.hedgehog_window import HedgehogWindow, HedgehogWindowOptions
from rewriter.mixers.linear.hedgehog import Hedgehog, HedgehogOptions
from rewriter.mixers.sparse.sink_window import SinkWindow, SinkWindowOptions

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
MIXERS: dict[str, tuple[type[Mixer], MixerOptions]] = {
    "keep": (Keep, KeepOptions()),
    "full": (SinkWindow, SinkWindowOptions(window=100)),
    "sink_window": (SinkWindow, SinkWindowOptions(window=6, sinks=2)),
    "hedgehog": (Hedgehog, HedgehogOptions()),
    "hedgehog_window": (HedgehogWindow, HedgehogWindowOptions(window=6, initial_log_ratio=1.0)),
}


def llama(spelling: Spelling = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return sharpen(model, spelling)


def half_sliding(spelling: Spelling = "sdpa") -> nn.Module:
    """First layer full attention, second a sliding window of 8."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    return sharpen(Qwen2ForCausalLM(config), spelling)


def sharpen(model: Any, spelling: Spelling) -> nn.Module:
    model.set_attn_implementation(spelling)
    for parameter in model.parameters():
        parameter.data *= 5.0  # so that attention is not nearly uniform
    out: nn.Module = model.eval()
    return out


def with_mixer(model: Any, name: str, layers: Iterable[int] = (0, 1)) -> Any:
    model = copy.deepcopy(model)
    spelling: Spelling = model.config._attn_implementation
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    for index in layers:
        atoms = (Causal(), *((Window(8),) if "sliding" in types[index] else ()), KeyPadding())
        step = FillTerm(0, -math.inf, True) if spelling == "sdpa" else AddTerm(0)
        site = AttentionSite(
            fqn=f"model.layers.{index}.self_attn",
            index=index,
            heads=HeadGroups(4, 2, 16, 16),
            score=(Scale(0.25), step),
            terms=("mask",),
            mask=Mask(atoms),
            spelling=spelling,
            source=Source("softmax"),
            softmax_dtype="float32" if spelling == "eager" else None,
        )
        cls, options = MIXERS[name]
        attention = model.model.layers[index].self_attn
        attention.core = cls(site, options, index)
        attention.forward = Core(attention)
    return model


class Core:
    """The attention module's forward with the softmax core replaced."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        owner, shape = self.owner, (*hidden_states.shape[:-1], -1, 16)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (owner.q_proj, owner.k_proj, owner.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, weights = owner.core(q, k, v, (attention_mask,), cache=past_key_values)
        return owner.o_proj(out.transpose(1, 2).flatten(2)), weights


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@torch.no_grad()
def generate(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    ids, mask = batch()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=11,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.scores)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_exact_cores_generate_like_the_model(spelling: Spelling, options: dict[str, Any]) -> None:
    model = llama(spelling)
    expected = generate(model, **options)
    kept = generate(with_mixer(model, "keep"), **options)
    assert torch.equal(kept[0], expected[0])
    assert torch.equal(kept[1], expected[1])
    same(generate(with_mixer(model, "full"), **options), expected)
    for layers in [(0,), (1,)]:
        same(generate(with_mixer(model, "full", layers), **options), expected)


@pytest.mark.parametrize("name", ["sink_window", "hedgehog", "hedgehog_window"])
@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)])
def test_cached_generation_equals_uncached(name: str, layers: tuple[int, ...]) -> None:
    model = with_mixer(llama(), name, layers)
    for options in [{}, {"num_beams": 3}]:
        expected = generate(model, use_cache=False, **options)
        same(generate(model, **options), expected)
    same(generate(model, cache_implementation="static"), generate(model, use_cache=False))


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)])
def test_models_with_sliding_layers(spelling: Spelling, layers: tuple[int, ...]) -> None:
    """Rewritten and untouched layers of each kind share masks made for the cache."""
    model = half_sliding(spelling)
    for name in ("keep", "full"):
        rewritten = with_mixer(model, name, layers)
        for options in [{}, {"cache_implementation": "static"}]:
            same(generate(rewritten, **options), generate(model, **options))
    model = with_mixer(model, "sink_window", layers)
    same(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("name", ["sink_window", "hedgehog", "hedgehog_window"])
def test_left_padded_rows_generate_like_single_prompts(name: str) -> None:
    model = with_mixer(llama(), name)
    ids, _ = batch()
    together = generate(model)[0]
    with torch.no_grad():
        alone = model.generate(
            ids[:1, 5:], max_new_tokens=11, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert torch.equal(together[0, 5:], alone[0])


@pytest.mark.parametrize("make", ["dynamic", "static", "lazy"])
@torch.no_grad()
def test_prefill_in_chunks(make: str) -> None:
    model = with_mixer(llama(), "hedgehog_window", (1,))
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache: Any = DynamicCache()
    if make == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    elif make == "dynamic":
        cache = DynamicCache(config=model.config)
    parts, at = [], 0
    for n in (6, 1, 6):
        piece = slice(at, at + n)
        parts.append(
            model(ids[:, piece], attention_mask=mask[:, : at + n], past_key_values=cache).logits
        )
        at += n
    assert cache.get_seq_length(1) == 13
    assert isinstance(cache.layers[1], MixerCacheLayer)
    assert not isinstance(cache.layers[0], MixerCacheLayer)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-4, rtol=1e-4)


def filled(layer: int = 0) -> tuple[DynamicCache, Any, Any]:
    """A cache after 13 tokens of a mixer, with the mixer and its model."""
    model = with_mixer(llama(), "hedgehog_window")
    ids, _ = batch()
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache, cache.layers[layer], model


def test_batch_operations() -> None:
    cache, layer, _ = filled()
    before = {name: tensor.clone() for name, tensor in layer.state.items()}
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(layer.state[n], t[[1, 0]]) for n, t in before.items())
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(layer.state[n], t[[1, 1, 0, 0]]) for n, t in before.items())
    cache.batch_select_indices(torch.tensor([3]))
    assert all(torch.equal(layer.state[n], t[[0]]) for n, t in before.items())
    assert cache.get_seq_length() == 13


@pytest.mark.usefixtures("generated_kernels")
def test_a_step_writes_over_the_state_that_the_cache_owns() -> None:
    model = with_mixer(llama(), "hedgehog")
    ids, _ = batch()
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        place = cache.layers[0].state["S"].data_ptr()
        whole = model(ids, use_cache=False).logits
        for n in range(9, 12):
            got = model(ids[:, n : n + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, whole[:, n : n + 1], atol=1e-4, rtol=1e-4)
        assert cache.layers[0].state["S"].data_ptr() == place
        twin = copy.deepcopy(cache)  # as prompt caches are reused
        ours, theirs = (
            model(ids[:, n : n + 1], past_key_values=c).logits for c, n in ((cache, 3), (twin, 12))
        )
        torch.testing.assert_close(theirs, whole[:, 12:], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours, theirs)
    before = twin.layers[0].state["S"]
    kept = before.clone()
    model(ids[:, :1], past_key_values=twin)  # autograd may need what was there
    assert torch.equal(before, kept) and twin.layers[0].state["S"] is not before


@pytest.mark.usefixtures("generated_kernels")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_owned_states_generate_like_no_cache(options: dict[str, Any]) -> None:
    """Padded batches, and beams that are repeated, dropped and reordered."""
    model = with_mixer(llama(), "hedgehog")
    same(generate(model, **options), generate(model, use_cache=False, **options))


def test_reset_starts_again() -> None:
    cache, layer, model = filled()
    ids, _ = batch()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert layer.state is None
    with torch.no_grad():
        again = model(ids[:1], past_key_values=cache).logits
        torch.testing.assert_close(again, model(ids[:1], use_cache=False).logits)


def test_what_a_state_cannot_do_is_refused() -> None:
    cache, layer, model = filled()
    layer.crop(0)
    with pytest.raises(UnsupportedError, match="assisted"):
        cache.crop(-1)
    with pytest.raises(UnsupportedError, match="mixer state"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    ids, _ = batch()
    with pytest.raises(UnsupportedError, match="holds 2 sequences but 1"), torch.no_grad():
        model(ids[:1, :1], past_key_values=cache)
    assert not cache.is_croppable
    assert not cache.is_compileable
    layer.offload()
    layer.prefetch()


def test_assisted_decoding_is_refused() -> None:
    model = with_mixer(llama(), "sink_window")
    ids, _ = batch()
    with pytest.raises(UnsupportedError, match="cannot be cropped"), torch.no_grad():
        model.generate(
            ids[:1], assistant_model=copy.deepcopy(llama()), max_new_tokens=6, pad_token_id=0
        )


def test_the_state_of_a_decoder_lies_in_its_cache_of_self_attention() -> None:
    cls, options = MIXERS["hedgehog"]
    model = with_mixer(llama(), "hedgehog")
    spec = cls.state_spec(model.model.layers[0].self_attn.core.site, options)
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    layer = layer_of(both, 0, spec)
    assert both.self_attention_cache.layers[0] is layer
    assert not both.cross_attention_cache.layers


def test_caches_that_cannot_hold_a_state_are_refused() -> None:
    cls, options = MIXERS["hedgehog"]
    model = with_mixer(llama(), "hedgehog")
    site = model.model.layers[0].self_attn.core.site
    spec = cls.state_spec(site, options)
    with pytest.raises(UnsupportedError, match="tuple"):
        layer_of(((), ()), 0, spec)
    used = DynamicCache()
    used.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(UnsupportedError, match="already holds"):
        layer_of(used, 0, spec)
    strange = DynamicCache()
    strange.layers.append(LinearAttentionLayer())
    with pytest.raises(UnsupportedError, match="LinearAttentionLayer"):
        layer_of(strange, 0, spec)
    cache, _, _ = filled()
    with pytest.raises(UnsupportedError, match="another mixer"):
        layer_of(cache, 0, spec)


def test_a_call_with_a_cache_but_no_place_in_it_is_refused() -> None:
    model = with_mixer(llama(), "hedgehog")
    model.model.layers[0].self_attn.core.layer = None
    ids, _ = batch()
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(ids, past_key_values=DynamicCache())


def test_missing_layers_are_made_and_sliding_is_taken_over() -> None:
    cls, options = MIXERS["hedgehog"]
    spec = cls.state_spec(
        with_mixer(llama(), "hedgehog").model.layers[0].self_attn.core.site, options
    )
    cache = DynamicCache()
    assert not layer_of(cache, 2, spec).is_sliding
    assert [type(x) for x in cache.layers[:2]] == [DynamicLayer, DynamicLayer]
    assert layer_of(cache, 2, spec) is cache.layers[2]
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    layer = layer_of(sliding, 0, spec)
    assert layer.is_sliding
    reference = DynamicSlidingWindowLayer(sliding_window=8)
    for n in (5, 1, 1, 1, 1, 4):
        assert layer.get_mask_sizes(n) == reference.get_mask_sizes(n)
        reference.update(torch.zeros(1, 1, n, 1), torch.zeros(1, 1, n, 1))
        layer.store({}, n)
    assert layer.get_seq_length() == 13


def test_a_static_layer_gives_its_memory_back() -> None:
    model = with_mixer(llama(), "sink_window")
    cache = StaticCache(config=model.config, max_cache_len=512)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    spec = model.model.layers[0].self_attn.core._spec
    layer = layer_of(cache, 0, spec)
    assert layer._replaced.keys is None
    assert layer.get_mask_sizes(3) == (512, 0)
