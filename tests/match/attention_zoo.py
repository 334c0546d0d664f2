"""Tiny random models with what the matcher must say about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers as hf
from tiny_models import BODY, COMMON, VOCABULARY, ExpSumAttention
from torch import nn

from rewriter.passes.capture import Captured, capture
from rewriter.passes.examples import examples_for
from rewriter.passes.match import MatchResult, match

LENGTH = 12
_GROUPED = {**BODY, "num_key_value_heads": 2}
BOTH = ("sdpa", "eager")
CAUSAL = "causal & key_padding"


@dataclass(frozen=True)
class Expected:
    """What must be found; `owner` has the layer index as {}."""

    owner: str
    masks: tuple[str, str]
    key_value: int = 4
    width: int = 16
    scale: float = 0.25
    softcap: float | None = None
    rotary_dim: int = 0
    position: str = "external"
    prescaled: float = 1.0
    qk_norm: bool = False
    fused: bool = False
    output: bool = True


@dataclass(frozen=True)
class Model:
    build: Callable[[str], nn.Module]
    expected: Expected
    spellings: tuple[str, ...] = BOTH
    inputs: Callable[[], dict[str, torch.Tensor]] = field(default=lambda: text())
    misses: int = 0


def text() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def hidden() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, LENGTH, 64)}


def decoder(config: Any) -> Callable[[str], nn.Module]:
    return lambda spelling: hf.AutoModelForCausalLM.from_config(
        config, attn_implementation=spelling
    )


def encoder(config: Any) -> Callable[[str], nn.Module]:
    return lambda spelling: hf.AutoModel.from_config(config, attn_implementation=spelling)


class EinsumAttention(nn.Module):
    """Causal attention in einsum, parameters without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(64, 4, 16) / 8) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 16, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bnd,dhe->bnhe", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 16**0.5
        n = x.shape[1]
        seen = torch.tril(torch.ones(n, n, dtype=torch.bool, device=x.device))
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        return torch.einsum("bqhe,hed->bqd", mixed, self.o)


class Stack(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Encoder(nn.Module):
    """torch's own encoder, whose eval mode bypasses its attention module."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.encoder(x, src_key_padding_mask=padded)
        return out


def _padded() -> dict[str, torch.Tensor]:
    return {**hidden(), "padded": torch.zeros(2, LENGTH, dtype=torch.bool)}


def _llama_like(owner: str = "model.layers.{}.self_attn", **changes: Any) -> Expected:
    values: dict[str, Any] = {"key_value": 2, "rotary_dim": 16, "position": "rotary"}
    values["masks"] = (CAUSAL, CAUSAL)
    return Expected(owner, **{**values, **changes})


_LOCAL = "causal & window(8) & key_padding"
_BERT = ("key_padding", "key_padding")

ZOO: dict[str, Model] = {
    "llama": Model(decoder(hf.LlamaConfig(**_GROUPED)), _llama_like()),
    "mistral": Model(
        decoder(hf.MistralConfig(**_GROUPED, sliding_window=8)),
        _llama_like(masks=(_LOCAL, _LOCAL)),
    ),
    "qwen2": Model(decoder(hf.Qwen2Config(**_GROUPED)), _llama_like()),
    "qwen3": Model(decoder(hf.Qwen3Config(**_GROUPED, head_dim=16)), _llama_like(qk_norm=True)),
    "gemma2": Model(
        decoder(hf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=8)),
        _llama_like(masks=(_LOCAL, CAUSAL), scale=0.0625, softcap=50.0),
        spellings=("eager",),
    ),
    "gemma3": Model(
        decoder(
            hf.Gemma3TextConfig(
                **_GROUPED,
                head_dim=16,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        _llama_like(masks=(_LOCAL, CAUSAL), scale=0.0625, qk_norm=True),
    ),
    "phi3": Model(decoder(hf.Phi3Config(**_GROUPED)), _llama_like(fused=True)),
    "gpt2": Model(
        decoder(hf.GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
        Expected("transformer.h.{}.attn", (CAUSAL, CAUSAL), fused=True),
    ),
    "gptneox": Model(
        decoder(hf.GPTNeoXConfig(**BODY)),
        Expected(
            "gpt_neox.layers.{}.attention",
            (CAUSAL, CAUSAL),
            rotary_dim=4,
            position="rotary",
            fused=True,
        ),
    ),
    "opt": Model(
        decoder(
            hf.OPTConfig(
                **COMMON,
                hidden_size=64,
                ffn_dim=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=64,
            )
        ),
        Expected("model.decoder.layers.{}.self_attn", (CAUSAL, CAUSAL), scale=1.0, prescaled=0.25),
    ),
    "bloom": Model(
        decoder(hf.BloomConfig(**COMMON, hidden_size=64, n_layer=2, n_head=4)),
        Expected("transformer.h.{}.self_attention", (CAUSAL, CAUSAL), position="alibi", fused=True),
        spellings=("eager",),
    ),
    "falcon-rotary-mqa": Model(
        decoder(
            hf.FalconConfig(**COMMON, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        Expected(
            "transformer.h.{}.self_attention",
            (CAUSAL, CAUSAL),
            key_value=1,
            rotary_dim=16,
            position="rotary",
            fused=True,
        ),
    ),
    "falcon-alibi": Model(
        decoder(
            hf.FalconConfig(
                **COMMON,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                alibi=True,
                multi_query=False,
            )
        ),
        Expected("transformer.h.{}.self_attention", (CAUSAL, CAUSAL), position="alibi", fused=True),
    ),
    "mixtral": Model(
        decoder(hf.MixtralConfig(**_GROUPED, num_local_experts=4)), _llama_like(), misses=2
    ),
    "bert": Model(
        encoder(hf.BertConfig(**BODY)),
        Expected("encoder.layer.{}.attention.self", _BERT),
    ),
    "roberta": Model(
        encoder(hf.RobertaConfig(**BODY, max_position_embeddings=64)),
        Expected("encoder.layer.{}.attention.self", _BERT),
    ),
    "distilbert": Model(
        encoder(
            hf.DistilBertConfig(
                vocab_size=VOCABULARY, dim=64, hidden_dim=96, n_layers=2, n_heads=4, pad_token_id=0
            )
        ),
        Expected("transformer.layer.{}.attention", _BERT),
    ),
    "modernbert": Model(
        encoder(hf.ModernBertConfig(**BODY, local_attention=8, global_attn_every_n_layers=2)),
        Expected(
            "layers.{}.attn",
            ("key_padding", "symmetric_window(4) & key_padding"),
            rotary_dim=16,
            position="rotary",
            fused=True,
        ),
    ),
    "vit": Model(
        encoder(
            hf.ViTConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        ),
        Expected("layers.{}.attention", ("full", "full")),
        inputs=image,
    ),
    "dinov2": Model(
        encoder(
            hf.Dinov2Config(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        ),
        Expected("encoder.layer.{}.attention", ("full", "full")),
        inputs=image,
    ),
    "torch-encoder": Model(
        lambda _: Encoder(),
        Expected("encoder.layers.{}.self_attn", _BERT, fused=True),
        spellings=("sdpa",),
        inputs=_padded,
    ),
    "einsum": Model(
        lambda _: Stack(EinsumAttention),
        Expected("layers.{}", ("causal", "causal")),
        spellings=("eager",),
        inputs=hidden,
    ),
    "hand-softmax": Model(
        lambda _: Stack(ExpSumAttention),
        Expected("layers.{}", ("full", "full"), fused=True),
        spellings=("eager",),
        inputs=hidden,
    ),
}
CASES = [(name, spelling) for name, model in ZOO.items() for spelling in model.spellings]
LOOK_ALIKE = frozenset(
    {
        ("qwen2", "sdpa"),
        ("qwen3", "eager"),
        ("gemma3", "sdpa"),
        ("phi3", "sdpa"),
        ("gptneox", "eager"),
        ("mixtral", "eager"),
        ("roberta", "eager"),
        ("distilbert", "sdpa"),
        ("dinov2", "eager"),
        ("vit", "sdpa"),
        ("modernbert", "eager"),
        ("opt", "eager"),
    }
)
"""Cases whose core is spelled just as in another case: they run nightly, for a short suite."""


@dataclass(frozen=True)
class Found:
    module: nn.Module
    captured: Captured
    result: MatchResult


@cache
def found(name: str, spelling: str) -> Found:
    """Capture and match once per session."""
    torch.manual_seed(0)
    module = ZOO[name].build(spelling).eval()
    examples = examples_for(module, ZOO[name].inputs())
    resized = (examples.resized.args, examples.resized.kwargs)
    captured = capture(module, (), examples.primary.kwargs, resized=resized)
    assert isinstance(captured, Captured), captured.describe()
    return Found(module, captured, match(captured))
