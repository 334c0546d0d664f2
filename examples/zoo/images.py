"""Models of images, videos, and of images with text."""

from __future__ import annotations

from typing import Any

import torch

from zoo.family import (
    BASE,
    BOTH,
    PADDED,
    VISION,
    Attention,
    Family,
    layers,
    of,
    pixels,
    text,
)


def _vision(name: str, owner: str, model: str, config: str, **options: Any) -> Family:
    sites = layers(owner, mask="full")
    return Family(name, of(model, config, **VISION, **options), pixels(), sites)


def _swin() -> Family:
    sites = tuple(
        Attention(f"encoder.layers.0.blocks.{i}.attention", mask, (2, 2), position="relative_bias")
        for i, mask in enumerate(("full", "full"))
    )
    build = of(
        "SwinModel",
        "SwinConfig",
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
    )
    return Family("swin", build, pixels(), sites)


def _detr() -> Family:
    import transformers as hf

    def backbone() -> Any:
        return hf.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 16],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage2"],
        )

    build = of(
        "DetrModel",
        "DetrConfig",
        backbone_config=backbone,
        num_queries=5,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
    )
    sites = (
        Attention("encoder.layers.0.self_attn", PADDED),
        Attention("decoder.layers.0.self_attn", "full"),
        Attention("decoder.layers.0.encoder_attn", PADDED, cross=True),
    )

    def inputs() -> dict[str, Any]:
        return {**pixels(64)(), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}

    return Family("detr", build, inputs, sites)


IMAGES: tuple[Family, ...] = (
    _vision("vit", "layers.{}.attention", "ViTModel", "ViTConfig"),
    _vision("deit", "layers.{}.attention", "DeiTModel", "DeiTConfig"),
    _vision("dinov2", "encoder.layer.{}.attention", "Dinov2Model", "Dinov2Config"),
    Family(
        "beit",
        of("BeitModel", "BeitConfig", **VISION, use_relative_position_bias=True),
        pixels(),
        layers("layers.{}.attention", mask="full", position="relative_bias"),
    ),
    _vision("clip-vision", "encoder.layers.{}.self_attn", "CLIPVisionModel", "CLIPVisionConfig"),
    Family(
        "clip-text",
        of("CLIPTextModel", "CLIPTextConfig", **BASE),
        text,
        layers("encoder.layers.{}.self_attn"),
    ),
    Family(
        "siglip-vision",
        of("SiglipVisionModel", "SiglipVisionConfig", **VISION),
        pixels(),
        (
            *layers("encoder.layers.{}.self_attn", mask="full"),
            Attention("head.attention", "full", cross=True, fused=True),
        ),
    ),
    Family(
        "siglip-text",
        of("SiglipTextModel", "SiglipTextConfig", **BASE),
        text,
        layers("encoder.layers.{}.self_attn", mask=PADDED),
    ),
    _swin(),
    Family(
        "videomae",
        of("VideoMAEModel", "VideoMAEConfig", **VISION, num_frames=4),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        layers("encoder.layer.{}.attention.attention", mask="full"),
    ),
    _detr(),
    Family(
        "sam-vision",
        of(
            "SamVisionModel",
            "SamVisionConfig",
            **{**VISION, "num_hidden_layers": 2},
            output_channels=16,
            window_size=3,
            global_attn_indexes=(1,),
            num_pos_feats=8,
            initializer_range=0.1,
        ),
        pixels(),
        layers(
            "vision_encoder.layers.{}.attn", 0, 1, mask="full", position="content_bias", fused=True
        ),
        BOTH,
    ),
)
