"""A rewritten model decodes as a compiled step: the same tokens, and the modules wherever asked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import rewriter
from rewriter.backends.registry import VARIABLE
from rewriter.passes.realise import apply_plan, share_parameters
from rewriter.passes.step import decoding_of
from rewriter.passes.step.model import STATE

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 199, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 199, "bos_token_id": 1,
         "eos_token_id": None}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=9)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=16, sliding_window=9)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**SMALL)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(**SMALL, rotary_dim=8)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES)),
}
NIGHTLY = pytest.mark.nightly
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(scope="module", autouse=True)
def all_backends() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        yield


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = MODELS[name]().to(dtype).eval()
    return model


def rewritten(model: nn.Module, policy: Any = "exact") -> Any:
    return rewriter.rewrite(model, policy, verify="none", on_miss="ignore")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = build("llama")
    return model, rewritten(model)


def generated(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=14, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **more,
    )  # fmt: skip


def prompt(batch: int = 2, n: int = 12) -> torch.Tensor:
    return torch.randint(2, 199, (batch, n), generator=torch.Generator().manual_seed(n))


def compare(model: Any, ours: Any, ids: torch.Tensor, limit: float = 1e-4, **more: Any) -> None:
    expected, got = generated(model, ids, **more), generated(ours, ids, **more)
    if limit < 1e-3:
        assert torch.equal(expected.sequences, got.sequences)
    worst = 0.0
    for a, b in zip(expected.logits, got.logits, strict=True):
        worst = max(worst, float((a - b).abs().max()))
        if limit >= 1e-3 and not torch.equal(a.argmax(-1), b.argmax(-1)):
            break  # rounding chose another token; what follows is another text
    assert worst <= limit


def steps(model: Any) -> int:
    """How many calls ran as a program."""
    return int(model.__dict__[STATE].ran)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (n, d) if n == "gpt2" and d == torch.float32 else pytest.param(n, d, marks=NIGHTLY)
        for n in MODELS
        for d in LIMITS
    ],
)
def test_the_same_tokens(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    ours = rewritten(model)
    compare(model, ours, prompt(), LIMITS[dtype])
    assert decoding_of(ours).startswith("as a compiled step (batch 2)"), decoding_of(ours)


def test_rows_gathered_from_a_table_are_part_of_the_step() -> None:
    """A rotary table repeated for the batch, its rows gathered, each entry twice in a row."""
    model = build("gptj", torch.float32)
    ours = rewritten(model)
    compare(model, ours, prompt(1))
    assert decoding_of(ours).startswith("as a compiled step (batch 1)"), decoding_of(ours)
    assert steps(ours) >= 10


def test_one_row_and_a_chosen_window_of_time(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    for n in (1, 12, 70):
        before = steps(ours)
        compare(model, ours, prompt(1, n))
        assert steps(ours) > before


def test_beams_move_the_cache(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    before = steps(ours)
    a, b = (m.generate(prompt(), max_new_tokens=12, num_beams=3) for m in (model, ours))
    assert torch.equal(a, b) and steps(ours) > before


def test_a_cache_may_be_handed_to_and_fro(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    ids = prompt(1, 30)
    caches = t.DynamicCache(), t.DynamicCache()
    before = steps(ours)
    with torch.no_grad():
        at = 0
        for new in (9, 1, 1, 1, 1, 3, 1, 1, 12):
            part = ids[:, at : at + new]
            a, b = (
                m(input_ids=part, past_key_values=c).logits
                for m, c in zip((model, ours), caches, strict=True)
            )
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            at += new
            if at == 13:
                for cache in caches:
                    cache.crop(-2)
                at = 11
    assert caches[1].get_seq_length() == caches[0].get_seq_length()
    torch.testing.assert_close(caches[1].layers[1].keys, caches[0].layers[1].keys)
    assert steps(ours) > before


@pytest.mark.parametrize("what", ["padding", "attentions", "gradients", "hook", "training"])
def test_other_calls_run_the_modules(pair: tuple[Any, Any], what: str) -> None:
    model, ours = pair
    generated(ours, prompt())
    before, more, ids = steps(ours), {}, prompt()
    if what == "padding":
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        more = {"attention_mask": mask}
    elif what == "attentions":
        more = {"output_hidden_states": True}
    if what == "gradients":
        cache = t.DynamicCache()
        ours(input_ids=ids, past_key_values=cache)
        assert ours(input_ids=ids[:, :1], past_key_values=cache).logits.requires_grad
    elif what == "hook":
        seen: list[int] = []
        handle = ours.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        generated(ours, ids)
        handle.remove()
        assert len(seen) == 14
    elif what == "training":
        ours.train()
        with torch.no_grad():
            generated(ours, ids)
        ours.eval()
    else:
        compare(model, ours, ids, **more)
    assert steps(ours) == before


def test_changed_weights_are_read(pair: tuple[Any, Any]) -> None:
    model, ours = copy.deepcopy(pair)
    generated(ours, prompt())
    with torch.no_grad():
        for m in (model, ours):
            m.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # where it is
            m.model.norm.weight = nn.Parameter(m.model.norm.weight * 2)  # somewhere else
    compare(model, ours, prompt())
    assert steps(ours) >= 20


def test_an_exchanged_module_is_honoured(pair: tuple[Any, Any]) -> None:
    model, ours = copy.deepcopy(pair)
    generated(ours, prompt())
    for m in (model, ours):
        m.model.layers[0].mlp.up_proj = nn.Sequential(m.model.layers[0].mlp.up_proj, nn.Tanh())
    before = steps(ours)
    compare(model, ours, prompt())
    assert steps(ours) == before


def test_copies_and_pickles(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    copied = copy.deepcopy(ours)
    assert isinstance(copied, type(model)) and type(copied).__name__ == type(model).__name__
    compare(model, copied, prompt())
    assert steps(copied) >= 10
    for module in copied.modules():  # hooks that asking for hidden states leaves do not pickle
        module._forward_hooks.clear()
    restored = pickle.loads(pickle.dumps(copied))
    compare(model, restored, prompt())
    assert "unpickled" in decoding_of(restored)


def test_a_loaded_model_steps_after_some_tokens(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    loaded = rewriter.load(tmp_path / "saved")
    assert type(loaded).__name__ == type(model).__name__ and isinstance(loaded, type(model))
    assert "then a step is made" in decoding_of(loaded)
    for _ in range(3):
        compare(model, loaded, prompt())
    assert decoding_of(loaded).startswith("as a compiled step (batch 2)"), decoding_of(loaded)
    assert steps(loaded) >= 10


def test_a_model_made_from_a_plan_steps(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    made = apply_plan(share_parameters(model), rewriter.plan_of(ours))
    with torch.inference_mode():
        for _ in range(3):
            compare(model, made, prompt(1))
    assert steps(made) >= 10
    plain = copy.deepcopy(pair)[1]
    assert plain.__dict__[STATE].template is not None


def test_a_hook_that_comes_later_is_seen(pair: tuple[Any, Any]) -> None:
    """Also one that is put where the dictionary of hooks itself was exchanged."""
    ours = copy.deepcopy(pair[1])
    generated(ours, prompt())
    guard = ours.__dict__[STATE].guard
    assert guard.holds() and guard.holds() and not guard.moved()
    block = ours.model.layers[1].mlp
    block._forward_hooks = type(block._forward_hooks)()
    assert guard.holds()
    block.register_forward_hook(lambda *_: None)
    assert not guard.holds()
    block._forward_hooks.clear()
    assert guard.holds()
    ours.model.norm.weight = nn.Parameter(ours.model.norm.weight.detach().clone())
    assert guard.holds() and guard.moved() and not guard.moved()
    ours.model.norm.weight.data = ours.model.norm.weight.data.clone()
    assert guard.holds() and guard.moved() and not guard.moved()
    block.train()
    assert not guard.holds()


def test_a_wrong_program_is_never_used(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.passes.step import rules

    wrong = dict(rules.RULES, **{"aten.silu.default": rules.RULES["aten.sigmoid.default"]})
    monkeypatch.setattr("rewriter.passes.step.lower.RULES", wrong)
    model, ours = copy.deepcopy(pair)
    compare(model, ours, prompt())
    assert "logits differ" in decoding_of(ours) and steps(ours) == 0


@NIGHTLY
def test_mixers_with_a_state_run_between_segments() -> None:
    model = build("llama")
    policy = {"rules": [{"layers": [0], "use": "fused"}, {"use": "sink_window",
              "options": {"window": 8, "sinks": 2}}]}  # fmt: skip
    ours = rewritten(model, policy)
    plain = copy.deepcopy(ours)
    plain.__dict__[STATE].template = None
    compare(plain, ours, prompt())
    assert steps(ours) >= 10
