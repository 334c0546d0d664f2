"""Tiny random models of many architectures, shared by the tests. Weights are enlarged so that
attention is far from uniform: with the usual small initial weights a wrong mask hardly shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 100
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BODY: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
GROUPED: dict[str, Any] = {**BODY, "num_key_value_heads": 2, "head_dim": 16}


def sharpen(model: nn.Module, factor: float = 3.0) -> nn.Module:
    """Enlarge every matrix of the model in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(factor)
    return model


def small_llama(seed: int = 0, **changes: Any) -> hf.LlamaForCausalLM:
    """A Llama of two layers of width 32, for tests that need any decoder."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **changes})).eval()


CAUSAL: dict[str, Callable[[str], nn.Module]] = {
    "llama": lambda a: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attn_implementation=a)),
    "mistral": lambda a: hf.MistralForCausalLM(
        hf.MistralConfig(**GROUPED, sliding_window=6, attn_implementation=a)
    ),
    "qwen2": lambda a: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**{**GROUPED, "head_dim": 16}, attn_implementation=a)
    ),
    "qwen3": lambda a: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, attn_implementation=a)),
    "gemma2": lambda a: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **GROUPED, query_pre_attn_scalar=16, sliding_window=6, attn_implementation=a
        )
    ),
    "gemma3": lambda a: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GROUPED, query_pre_attn_scalar=16, sliding_window=6, attn_implementation=a
        )
    ),
    "phi3": lambda a: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **{k: v for k, v in GROUPED.items() if k != "head_dim"}, attn_implementation=a
        )
    ),
    "gpt2": lambda a: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **COMMON, n_embd=64, n_layer=2, n_head=4, n_positions=256, attn_implementation=a
        )
    ),
    "gpt_neox": lambda a: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**BODY, attn_implementation=a)),
    "opt": lambda a: hf.OPTForCausalLM(
        hf.OPTConfig(
            **COMMON,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=64,
            max_position_embeddings=256,
            attn_implementation=a,
        )
    ),
    "bloom": lambda a: hf.BloomForCausalLM(
        hf.BloomConfig(**COMMON, hidden_size=64, n_layer=2, n_head=4, attn_implementation=a)
    ),
    "falcon": lambda a: hf.FalconForCausalLM(
        hf.FalconConfig(
            **COMMON,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            attn_implementation=a,
        )
    ),
}

ENCODERS: dict[str, Callable[[str], nn.Module]] = {
    "bert": lambda a: hf.BertModel(hf.BertConfig(**BODY, attn_implementation=a)),
    "roberta": lambda a: hf.RobertaModel(hf.RobertaConfig(**BODY, attn_implementation=a)),
    "distilbert": lambda a: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=96,
            attn_implementation=a,
        )
    ),
    "modernbert": lambda a: hf.ModernBertModel(
        hf.ModernBertConfig(
            **{**BODY, "cls_token_id": 1, "sep_token_id": 2},
            local_attention=8,
            attn_implementation=a,
        )
    ),
    "vit": lambda a: hf.ViTModel(
        hf.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            attn_implementation=a,
        )
    ),
    "dinov2": lambda a: hf.Dinov2Model(
        hf.Dinov2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            attn_implementation=a,
        )
    ),
}

EAGER_ONLY = {"gemma2", "bloom"}


def build(name: str, implementation: str = "sdpa", seed: int = 0) -> Any:
    """A tiny sharpened model in evaluation mode."""
    torch.manual_seed(seed)
    maker = {**CAUSAL, **ENCODERS}[name]
    return sharpen(maker("eager" if name in EAGER_ONLY else implementation)).eval()


class EinsumAttention(nn.Module):
    """Hand-written causal attention in einsum."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (f(x).view(shape) for f in (self.to_q, self.to_k, self.to_v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (width // self.heads) ** 0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, tokens, width))


class ExpSumAttention(nn.Module):
    """Hand-written bidirectional attention with its own softmax and bmm."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            t.view(batch, tokens, self.heads, -1).transpose(1, 2).reshape(-1, tokens, width // 4)
            for t in self.qkv(x).chunk(3, dim=-1)
        )
        scores = torch.bmm(q, k.transpose(1, 2)) * (width // self.heads) ** -0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.bmm(weights, v).view(batch, self.heads, tokens, -1).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, width))


class Residual(nn.Module):
    """A block around an attention, so that the attention is not the whole model."""

    def __init__(self, attention: nn.Module, width: int = 64):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm(x))
