"""Encoders with decoders, models of speech, and models of time series."""

from __future__ import annotations

from typing import Any

import torch

from zoo.family import (
    BASE,
    CAUSAL,
    EAGER,
    PADDED,
    SPECIAL,
    TARGETS,
    VOCABULARY,
    Attention,
    Family,
    layers,
    of,
    tokens,
    translation,
)

_DEPTHS = {"encoder_layers": 1, "decoder_layers": 1}
_WIDTHS = {
    **_DEPTHS,
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}


def _t5() -> Family:
    block = "{}.block.0.layer.{}.{}"
    sites = (
        Attention(
            block.format("encoder", 0, "SelfAttention"), PADDED, position="relative_bias", scale=1.0
        ),
        Attention(
            block.format("decoder", 0, "SelfAttention"), CAUSAL, position="relative_bias", scale=1.0
        ),
        Attention(block.format("decoder", 1, "EncDecAttention"), PADDED, scale=1.0, cross=True),
    )
    build = of(
        "T5Model",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return Family("t5", build, translation, sites)


def _pair(encoder: str, own: str, cross: str, **facts: Any) -> tuple[Attention, ...]:
    """Encoder, decoder and cross attention named as most families do."""
    return (
        Attention("encoder.layers.0.self_attn", encoder, **facts),
        Attention("decoder.layers.0.self_attn", own, **facts),
        Attention("decoder.layers.0.encoder_attn", cross, cross=True, **facts),
    )


def _series(steps: int = 12, ahead: int = 5, lags: int = 3) -> dict[str, Any]:
    past = steps + lags
    return {
        "past_values": torch.rand(2, past),
        "past_time_features": torch.rand(2, past, 2),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.rand(2, ahead),
        "future_time_features": torch.rand(2, ahead, 2),
    }


_TIME = {
    **_WIDTHS,
    "prediction_length": 5,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_SPEECH = {
    **BASE,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def _wave() -> dict[str, Any]:
    return {
        "input_values": torch.randn(2, 204),
        "attention_mask": torch.ones(2, 204, dtype=torch.long),
    }


SEQUENCES: tuple[Family, ...] = (
    _t5(),
    Family(
        "bart",
        of(
            "BartModel",
            "BartConfig",
            **_WIDTHS,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            **SPECIAL,
        ),
        translation,
        _pair(PADDED, CAUSAL, PADDED),
    ),
    Family(
        "marian",
        of(
            "MarianModel",
            "MarianConfig",
            **_WIDTHS,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            decoder_start_token_id=0,
            **SPECIAL,
        ),
        translation,
        _pair(PADDED, CAUSAL, PADDED),
    ),
    Family(
        "whisper",
        of(
            "WhisperModel",
            "WhisperConfig",
            **_WIDTHS,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=15,
            max_target_positions=32,
            decoder_start_token_id=1,
            **SPECIAL,
        ),
        lambda: {
            "input_features": torch.randn(2, 8, 30),
            "decoder_input_ids": tokens(length=TARGETS),
            "decoder_attention_mask": torch.ones(2, TARGETS, dtype=torch.long),
        },
        _pair("full", CAUSAL, "full", scale=1.0, prescaled=0.25),
    ),
    Family(
        "moonshine",
        of(
            "MoonshineModel",
            "MoonshineConfig",
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            max_position_embeddings=64,
        ),
        lambda: {
            "input_values": torch.randn(2, 5000),
            "decoder_input_ids": tokens(length=TARGETS),
            "decoder_attention_mask": torch.ones(2, TARGETS, dtype=torch.long),
        },
        (
            Attention("encoder.layers.0.self_attn", "full", rotary_dim=14, position="rotary"),
            Attention("decoder.layers.0.self_attn", CAUSAL, rotary_dim=14, position="rotary"),
            Attention("decoder.layers.0.encoder_attn", "full", cross=True),
        ),
    ),
    Family(
        "wav2vec2",
        of("Wav2Vec2Model", "Wav2Vec2Config", **_SPEECH),
        _wave,
        layers("encoder.layers.{}.attention", mask=PADDED),
    ),
    Family(
        "hubert",
        of("HubertModel", "HubertConfig", **_SPEECH),
        _wave,
        layers("encoder.layers.{}.attention", mask=PADDED),
    ),
    Family(
        "time-series",
        of("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", **_TIME),
        _series,
        _pair("full", "causal", "full"),
        EAGER,
    ),
    Family(
        "informer",
        of("InformerModel", "InformerConfig", **_TIME),
        _series,
        (Attention("decoder.layers.0.encoder_attn", "full", cross=True),),
        EAGER,
        ("picked by the largest", "picked by the largest"),
    ),
    Family(
        "autoformer",
        # Under export its masks are added to (tokens, channels) products: both must count 16.
        of(
            "AutoformerModel",
            "AutoformerConfig",
            **{**_TIME, "context_length": 16, "prediction_length": 12},
            label_length=4,
            moving_average=3,
        ),
        lambda: _series(16, 12),
        (),
        EAGER,
        ("", "", ""),
        half=False,  # Fourier transforms
    ),
)
