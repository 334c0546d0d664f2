"""The MLP blocks of every family of the zoo, written down by hand from the family's definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mlp:
    """One MLP block.

    Attributes:
        down: the parameter that holds its down projection.
        activation: function of the (gated) hidden values.
        kind: plain, glu, fused_glu, conv1x1 or experts.
        hidden: hidden channels.
    """

    down: str
    activation: str
    kind: str = "plain"
    hidden: int = 96


def _many(
    down: str, count: int, activation: str, kind: str = "plain", hidden: int = 96
) -> tuple[Mlp, ...]:
    return tuple(Mlp(down.format(i), activation, kind, hidden) for i in range(count))


_USUAL = "model.layers.{}.mlp.down_proj.weight"
_EXPERTS = "model.layers.{}.mlp.experts.down_proj"
_TEXT = "encoder.layer.{}.output.dense.weight"
_FOURFOLD = "transformer.h.{}.mlp."


def _silu(layers: int = 1) -> tuple[Mlp, ...]:
    return _many(_USUAL, layers, "silu", "glu")


def _pair(activation: str) -> tuple[Mlp, ...]:
    return tuple(Mlp(f"{side}.layers.0.fc2.weight", activation) for side in ("encoder", "decoder"))


MLPS: Mapping[str, tuple[Mlp, ...]] = {
    "llama": _silu(2),
    **{n: _silu() for n in ("mistral", "qwen2", "qwen3", "stablelm", "olmo2", "cohere", "granite")},
    "deepseek-v3": _silu(),
    "gemma2": _many(_USUAL, 2, "gelu_tanh", "glu"),
    "gemma3": _many(_USUAL, 2, "gelu_tanh", "glu"),
    "phi3": _many(_USUAL, 1, "silu", "fused_glu"),
    "mixtral": _many(_EXPERTS, 1, "silu", "experts"),
    "qwen3-moe": _many(_EXPERTS, 1, "silu", "experts", 32),
    "gpt-oss": _many(_EXPERTS, 2, "swiglu_clamped", "experts"),
    "llama4": tuple(
        mlp
        for i in range(2)
        for mlp in (
            Mlp(f"model.layers.{i}.feed_forward.experts.down_proj", "silu", "experts"),
            Mlp(f"model.layers.{i}.feed_forward.shared_expert.down_proj.weight", "silu", "glu"),
        )
    ),
    "starcoder2": _many("model.layers.{}.mlp.c_proj.weight", 1, "gelu_tanh"),
    "phi": _many("model.layers.{}.mlp.fc2.weight", 1, "gelu_tanh"),
    "gpt2": _many(_FOURFOLD + "c_proj.weight", 1, "gelu_tanh", hidden=256),
    "gpt-bigcode": _many(_FOURFOLD + "c_proj.weight", 1, "gelu_tanh", hidden=256),
    "gpt-j": _many(_FOURFOLD + "fc_out.weight", 1, "gelu_tanh", hidden=256),
    "codegen": _many(_FOURFOLD + "fc_out.weight", 1, "gelu_tanh", hidden=256),
    "bloom": _many(_FOURFOLD + "dense_4h_to_h.weight", 1, "gelu_tanh", hidden=256),
    "falcon-rotary": _many(_FOURFOLD + "dense_4h_to_h.weight", 1, "gelu", hidden=256),
    "falcon-alibi": _many(_FOURFOLD + "dense_4h_to_h.weight", 1, "gelu", hidden=256),
    "gptneox": _many("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", 1, "gelu"),
    "opt": _many("model.decoder.layers.{}.fc2.weight", 1, "relu"),
    "mpt": _many("transformer.blocks.{}.ffn.down_proj.weight", 1, "gelu", hidden=256),
    "decision-transformer": _many("encoder.h.{}.mlp.c_proj.weight", 1, "relu", hidden=256),
    **{
        n: _many(_TEXT, 1, "gelu")
        for n in (
            "bert",
            "roberta",
            "electra",
            "esm",
            "esm-rotary",
            "mpnet",
            "convbert",
            "deberta-v2",
            "longformer",
            "videomae",
        )
    },
    "albert": 2
    * _many("encoder.albert_layer_groups.0.albert_layers.{}.ffn_output.weight", 1, "gelu_tanh"),
    "distilbert": _many("transformer.layer.{}.ffn.lin2.weight", 1, "gelu"),
    "modernbert": _many("layers.{}.mlp.Wo.weight", 2, "gelu", "fused_glu"),
    "bigbird-sparse": _many(_TEXT, 1, "gelu_tanh"),
    "bigbird-full": _many(_TEXT, 1, "gelu_tanh"),
    "t5": (
        Mlp("encoder.block.0.layer.1.DenseReluDense.wo.weight", "relu"),
        Mlp("decoder.block.0.layer.2.DenseReluDense.wo.weight", "relu"),
    ),
    **{n: _pair("gelu") for n in ("bart", "marian", "whisper", "time-series", "informer")},
    "autoformer": _pair("gelu"),
    "moonshine": (
        Mlp("encoder.layers.0.mlp.fc2.weight", "gelu"),
        Mlp("decoder.layers.0.mlp.fc2.weight", "silu", "fused_glu"),
    ),
    "wav2vec2": _many("encoder.layers.{}.feed_forward.output_dense.weight", 1, "gelu"),
    "hubert": _many("encoder.layers.{}.feed_forward.output_dense.weight", 1, "gelu"),
    **{n: _many("layers.{}.mlp.fc2.weight", 1, "gelu") for n in ("vit", "deit", "beit")},
    "dinov2": _many("encoder.layer.{}.mlp.fc2.weight", 1, "gelu", hidden=256),
    "clip-vision": _many("encoder.layers.{}.mlp.fc2.weight", 1, "quick_gelu"),
    "clip-text": _many("encoder.layers.{}.mlp.fc2.weight", 1, "quick_gelu"),
    "siglip-vision": (
        Mlp("encoder.layers.0.mlp.fc2.weight", "gelu_tanh"),
        Mlp("head.mlp.fc2.weight", "gelu_tanh"),
    ),
    "siglip-text": _many("encoder.layers.{}.mlp.fc2.weight", 1, "gelu_tanh"),
    "swin": _many("encoder.layers.0.blocks.{}.mlp.fc2.weight", 2, "gelu", hidden=128),
    "detr": tuple(Mlp(f"{s}.layers.0.mlp.fc2.weight", "relu") for s in ("encoder", "decoder")),
    "sam-vision": _many("vision_encoder.layers.{}.mlp.lin2.weight", 2, "gelu", hidden=256),
    "torch-encoder": _many("encoder.layers.{}.linear2.weight", 2, "relu"),
    "torch-decoder": _many("decoder.layers.{}.linear2.weight", 1, "relu"),
}
"""By family; those that are left out have none."""
