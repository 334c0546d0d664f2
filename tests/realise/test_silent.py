"""A block without attention runs none of its projections, and is the same function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import small_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import rewriter


def gpt2() -> nn.Module:
    """Biases on every projection, and query, key and value in one product."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=96, n_positions=512, eos_token_id=2)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "llama": (
        lambda: small_llama(num_hidden_layers=2, eos_token_id=2),
        "model.layers.1.self_attn",
        ("q_proj", "k_proj", "v_proj"),
    ),
    "gpt2": (gpt2, "transformer.h.1.attn", ("c_attn",)),
}


@contextmanager
def counted(owner: nn.Module) -> Iterator[Counter[str]]:
    """Tokens that went through each child."""
    seen: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
            seen[name] += args[0].numel() // args[0].shape[-1]

        return hook

    hooks = [
        child.register_forward_hook(note(name))
        for name, child in owner.named_children()
        if name != "core"
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", list(MODELS))
def test_projections_around_a_dropped_core_do_not_run(name: str) -> None:
    make, path, operands = MODELS[name]
    model = make()
    dropped = rewriter.rewrite(model, {"rules": [{"layers": [1], "use": "drop"}]})
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), counted(dropped.get_submodule(path)) as seen:
        ours = dropped(ids, use_cache=False).logits
    assert not set(operands) & set(seen)
    assert seen["o_proj" if name == "llama" else "c_proj"] == 1
    # the oracle: the original code on values of 0
    owner = model.get_submodule(path)
    output = owner.get_submodule("o_proj" if name == "llama" else "c_proj")
    handle = output.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(ours, theirs)


def test_a_dropped_first_layer_still_counts_the_tokens_of_the_cache() -> None:
    model = small_llama(num_hidden_layers=2, eos_token_id=2)
    dropped = rewriter.rewrite(model, {"rules": [{"layers": [0], "use": "drop"}]}, verify="none")
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = dropped(ids, use_cache=False).logits[:, -1]
        first = dropped(ids[:, :5], use_cache=True)
        rest = dropped(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits[:, -1], whole, rtol=1e-4, atol=1e-5)
