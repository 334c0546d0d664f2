"""Bidirectional encoders of text and of proteins."""

from __future__ import annotations

from typing import Any

import torch

from zoo.family import (
    BASE,
    BOTH,
    EAGER,
    PADDED,
    VOCABULARY,
    Attention,
    Family,
    layers,
    of,
    text,
    tokens,
)

_PIECE = "block by block"


def _encoder(
    name: str,
    owner: str,
    model: str,
    config: str,
    implementations: tuple[str, ...] = BOTH,
    refused: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> Family:
    sites = layers(owner, **{"mask": PADDED, **(facts or {})})
    build = of(model, config, **{**BASE, **options})
    return Family(name, build, text, sites, implementations, refused)


def _long(length: int) -> dict[str, Any]:
    ids = tokens(length=length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_SELF = "encoder.layer.{}.attention.self"

ENCODERS: tuple[Family, ...] = (
    _encoder("bert", _SELF, "BertModel", "BertConfig"),
    _encoder("roberta", _SELF, "RobertaModel", "RobertaConfig"),
    _encoder("electra", _SELF, "ElectraModel", "ElectraConfig", embedding_size=32),
    _encoder("esm", _SELF, "EsmModel", "EsmConfig", mask_token_id=4, facts={}),
    _encoder(
        "esm-rotary",
        _SELF,
        "EsmModel",
        "EsmConfig",
        mask_token_id=4,
        position_embedding_type="rotary",
        facts={"scale": 1.0, "prescaled": 0.25, "rotary_dim": 16, "position": "rotary"},
    ),
    Family(
        "albert",
        of("AlbertModel", "AlbertConfig", **{**BASE, "num_hidden_layers": 2}, embedding_size=32),
        text,
        2 * layers("encoder.albert_layer_groups.0.albert_layers.0.attention", mask=PADDED),
    ),
    Family(
        "distilbert",
        of(
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=64,
            hidden_dim=96,
            n_layers=1,
            n_heads=4,
            pad_token_id=0,
        ),
        text,
        layers("transformer.layer.{}.attention", mask=PADDED),
    ),
    Family(
        "modernbert",
        of(
            "ModernBertModel",
            "ModernBertConfig",
            **{**BASE, "num_hidden_layers": 2},
            local_attention=8,
            global_attn_every_n_layers=2,
        ),
        text,
        tuple(
            Attention(f"layers.{i}.attn", mask, rotary_dim=16, position="rotary", fused=True)
            for i, mask in enumerate((PADDED, "symmetric_window(4) & key_padding"))
        ),
    ),
    Family(
        "mpnet",
        of("MPNetModel", "MPNetConfig", **BASE),
        text,
        layers("encoder.layer.{}.attention.attn", mask=PADDED, position="relative_bias"),
        EAGER,
    ),
    _encoder(
        "convbert",
        _SELF,
        "ConvBertModel",
        "ConvBertConfig",
        EAGER,
        ("follows a projection",),
        {"heads": (2, 2)},
        embedding_size=64,
        head_ratio=2,
        conv_kernel_size=3,
    ),
    _encoder(
        "deberta-v2",
        _SELF,
        "DebertaV2Model",
        "DebertaV2Config",
        EAGER,
        facts={"scale": 48**-0.5, "position": "content_bias"},
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    Family(
        "longformer",
        of("LongformerModel", "LongformerConfig", **BASE, attention_window=4),
        lambda: _long(16),
        (),
        EAGER,
        untraceable="data-dependent",
    ),
    Family(
        "bigbird-sparse",
        of(
            "BigBirdModel",
            "BigBirdConfig",
            **{**BASE, "max_position_embeddings": 128},
            block_size=4,
            num_random_blocks=1,
        ),
        lambda: _long(64),
        (),
        EAGER,
        (*2 * (_PIECE,), "joined side by side", *2 * (_PIECE,)),
    ),
    _encoder(
        "bigbird-full",
        _SELF,
        "BigBirdModel",
        "BigBirdConfig",
        EAGER,
        attention_type="original_full",
    ),
)
