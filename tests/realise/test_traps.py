"""Every trap that re-emission is known to fall into, as a test on tiny models."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, Residual, build
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM

import rewriter
from rewriter.passes.realise.owner import emissions_of

WINDOW = {"rules": [{"use": "sink_window", "options": {"window": 5, "sinks": 2}}]}

WIDE = {"rules": [{"use": "sink_window", "options": {"window": 16, "sinks": 2}}]}


def rewritten(model: nn.Module, policy: Any = "identity", **kwargs: Any) -> Any:
    return rewriter.rewrite(model, policy, verify="none", **kwargs)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def llama_identity(llama: Any) -> Any:
    return rewritten(llama)


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def first_owner(model: nn.Module) -> nn.Module:
    return model.get_submodule(rewriter.plan_of(model).decisions[0].fqn)


def test_sizes_come_from_the_data_not_from_the_mask(llama_identity: Any) -> None:
    for emission in emissions_of(first_owner(llama_identity)):
        assert "attention_mask.size" not in emission.source


def test_view_after_the_core_takes_any_memory_layout(llama_identity: Any) -> None:
    model = copy.deepcopy(llama_identity)
    owner = first_owner(model)
    core = owner.get_submodule("core")
    forward = core.forward

    def strided(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        return out.transpose(1, 2).contiguous().transpose(1, 2).mT.contiguous().mT, weights

    core.forward = strided
    x = ids(2, 9)
    torch.testing.assert_close(model(x).logits, llama_identity(x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_mask_absent_at_run_time_though_traced_with_one(implementation: str) -> None:
    model = build("bert", implementation)
    result = rewritten(model)
    x = ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, 6:] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        expected = model(x, **kwargs).last_hidden_state
        assert torch.equal(result(x, **kwargs).last_hidden_state, expected)
    assert len(emissions_of(first_owner(result))) >= 2


class ComputesOnItsMask(nn.Module):
    """An attention module that calculates with the mask before the core sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        bias = None if keep is None else ((1.0 - keep) * -1e9)[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(out.transpose(1, 2).flatten(2))


def test_each_pattern_of_absent_inputs_has_its_own_graph() -> None:
    torch.manual_seed(0)
    model = ComputesOnItsMask().eval()
    x = torch.randn(2, 11, 64)
    keep = torch.ones(2, 11)
    keep[1, 7:] = 0.0
    result = rewritten(model, example_inputs=(x, keep))
    assert torch.equal(result(x, keep), model(x, keep))
    assert torch.equal(result(x), model(x))
    assert torch.equal(result(x[:1, :1]), model(x[:1, :1]))


@pytest.mark.parametrize("policy", ["exact", WIDE])
def test_positions_of_one_row_and_of_each_row(policy: Any) -> None:
    """A table repeated once for every row of positions: one row's trace does not serve several."""
    torch.manual_seed(0)
    config = GPTJConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY, rotary_dim=8,
                        n_positions=64, bos_token_id=1, eos_token_id=None)  # fmt: skip
    model = GPTJForCausalLM(config).eval()
    ours = rewritten(model, policy)
    for rows, padded in ((1, 0), (2, 0), (3, 2), (1, 0)):
        mask = torch.ones(rows, 5, dtype=torch.int64)
        mask[0, :padded] = 0
        more = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        prompt = ids(rows, 5)
        assert torch.equal(ours.generate(prompt, **more), model.generate(prompt, **more))


def test_sliding_window_padding_is_not_read_off_the_last_mask_row() -> None:
    """Keys outside the window of the last query are not padding: cached equals uncached."""
    result = rewritten(build("mistral"), WINDOW)
    x = ids(2, 17)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = result.generate(x, use_cache=True, **kwargs)
    assert torch.equal(cached, result.generate(x, use_cache=False, **kwargs))


def test_folded_batch_and_heads_allow_beam_reorder() -> None:
    result = rewritten(build("bloom"), WINDOW)
    kwargs = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = result.generate(ids(2, 9), use_cache=True, **kwargs)
    assert torch.equal(cached, result.generate(ids(2, 9), use_cache=False, **kwargs))


def test_fully_masked_rows_stay_finite(llama: Any) -> None:
    result = rewritten(llama, WINDOW)
    x = ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    assert bool(torch.isfinite(result(x, attention_mask=mask).logits).all())


def test_pickles_and_copies(llama_identity: Any) -> None:
    x = ids(2, 9)
    expected = llama_identity(x).logits
    assert torch.equal(copy.deepcopy(llama_identity)(x).logits, expected)
    owner = first_owner(llama_identity)
    again = pickle.loads(pickle.dumps(owner))
    assert type(again).__name__ == type(owner).__name__
    assert list(again.state_dict()) == list(owner.state_dict())
    buffer = io.BytesIO()
    torch.save(owner, buffer)
    assert buffer.tell() > 0


def test_container_that_reads_private_attributes_and_bypasses_children() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 11, 64)
    result = rewritten(model, example_inputs=(x,))
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    owner = first_owner(result)
    assert owner._qkv_same_embed_dim == first_owner_of(model)._qkv_same_embed_dim  # type: ignore[attr-defined]
    with torch.no_grad():
        windowed = rewritten(
            model,
            {"rules": [{"use": "sink_window", "options": {"window": 2, "sinks": 0}}]},
            example_inputs=(x,),
        )
        assert not torch.allclose(windowed(x), model(x), atol=1e-3)


def first_owner_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))


def test_original_is_untouched_and_shares_its_parameters(llama: Any) -> None:
    before = {n: p.clone() for n, p in llama.state_dict().items()}
    classes = [type(m) for m in llama.modules()]
    result = rewritten(llama, WINDOW)
    assert classes == [type(m) for m in llama.modules()]
    assert all(torch.equal(before[n], p) for n, p in llama.state_dict().items())
    theirs = dict(llama.named_parameters())
    assert all(p is theirs[n] for n, p in result.named_parameters() if n in theirs)
    assert not any("core" in name for name in llama.state_dict())
    assert isinstance(result, type(llama))


def test_keys_and_their_order_are_unchanged(llama: Any) -> None:
    result = rewritten(llama, {"rules": [{"use": "hedgehog"}]})
    kept = [k for k in result.state_dict() if ".core." not in k]
    assert kept == list(llama.state_dict())
    assert any(".core." in k for k in result.state_dict())


def test_identical_layers_share_one_traced_graph(llama_identity: Any) -> None:
    owners = [
        llama_identity.get_submodule(d.fqn) for d in rewriter.plan_of(llama_identity).decisions
    ]
    assert emissions_of(owners[0])[0] is emissions_of(owners[1])[0]


def test_dropout_follows_train_and_eval() -> None:
    torch.manual_seed(0)
    model = build("gpt2", "eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
    result = rewritten(model)
    x = ids(2, 9)
    result.train()
    torch.manual_seed(1)
    first = result(x).logits
    assert not torch.allclose(first, result(x).logits)
    result.eval()
    assert torch.equal(result(x).logits, model(x).logits)


def test_child_replaced_after_the_rewrite_is_honoured(llama: Any) -> None:
    result = rewritten(llama, WINDOW)
    x = ids(2, 9)
    before = result(x).logits
    owner = first_owner(result)
    wider = nn.Sequential(owner.q_proj, nn.Identity())
    owner.q_proj = wider
    torch.testing.assert_close(result(x).logits, before)
    wider[1] = nn.Dropout(1.0).train()
    assert not torch.allclose(result(x).logits, before)


def test_gradients_reach_every_parameter(llama: Any) -> None:
    result = rewritten(llama, {"rules": [{"use": "hedgehog_window", "options": {"window": 4}}]})
    result(ids(2, 13)).logits.square().mean().backward()
    missing = [n for n, p in result.named_parameters() if p.grad is None]
    assert missing == []
    for parameter in result.parameters():
        parameter.grad = None


def test_gradient_checkpointing_gives_the_same_gradients(llama: Any) -> None:
    result = copy.deepcopy(rewritten(llama, WINDOW)).train()
    x = ids(2, 13)
    grads = []
    for on in (False, True):
        if on:
            result.gradient_checkpointing_enable()
        result.zero_grad()
        result(x, use_cache=False).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in result.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_as_the_whole_model_and_as_a_child() -> None:
    from tiny_models import EinsumAttention, ExpSumAttention

    torch.manual_seed(0)
    x = torch.randn(2, 11, 64)
    for make in (EinsumAttention, ExpSumAttention):
        for model in (make().eval(), Residual(make()).eval()):
            result = rewritten(model, example_inputs=(x,))
            torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-6)
