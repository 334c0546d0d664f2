"""Tiny models, and a stand-in for the rewrite: a one-parameter mixer hooked into each owner."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.plan import Decision, Plan


class NoOptions(MixerOptions):
    pass


class Scaled(Mixer):
    info: ClassVar[MixerInfo] = MixerInfo(
        "keep", "exact", "exact", "", "", "", frozenset({"causal", "bidirectional"})
    )
    Options: ClassVar[type[MixerOptions]] = NoOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.gain = nn.Parameter(torch.ones(1))


def stub_registry() -> ModuleType:
    module = ModuleType("rewriter.mixers.registry")
    module.available = lambda: ("keep",)  # type: ignore[attr-defined]
    module.get = {"keep": Scaled}.__getitem__  # type: ignore[attr-defined]
    return module


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    for decision in plan.decisions:
        owner = model.get_submodule(decision.fqn)
        owner.core = Scaled(AttentionSite.from_json(decision.site), NoOptions())
        owner.register_forward_hook(_times_gain)
    return model


def _times_gain(owner: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] * owner.core.gain  # type: ignore[operator, union-attr]
    return (first, *output[1:])


def plan_for(fqns: list[str]) -> Plan:
    heads = HeadGroups(4, 2, 8, 8)
    mask = Mask((Causal(),))
    out = Plan(policy="test")
    for i, fqn in enumerate(fqns):
        site = AttentionSite(fqn, i, heads, (Scale(0.5),), (), mask, "sdpa", Source("sdpa", fqn))
        out.decisions.append(Decision(fqn=fqn, index=i, target="keep", site=site.to_json()))
    return out


LLAMA_SITES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def tiny_llama(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[UNK]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(61))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )


def rewritten_llama(tied: bool = True) -> tuple[LlamaForCausalLM, Plan]:
    model, plan = tiny_llama(tied), plan_for(LLAMA_SITES)
    apply_plan(model, plan)
    with torch.no_grad():
        for i, fqn in enumerate(LLAMA_SITES):
            model.get_submodule(fqn).core.gain.fill_(1.5 + i)  # type: ignore[union-attr, operator]
    return model, plan


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
