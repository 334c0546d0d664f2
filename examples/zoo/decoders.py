"""Causal language models."""

from __future__ import annotations

from typing import Any

from zoo.family import (
    BASE,
    BOTH,
    CAUSAL,
    EAGER,
    GROUPED,
    SPECIAL,
    VOCABULARY,
    Attention,
    Family,
    layers,
    of,
    text,
)

_LOCAL = "causal & window(8) & key_padding"
_CHUNKS = "causal & chunk_after_padding(8) & key_padding"
"""Chunks are counted from each row's first real token."""
_TWO = {"num_hidden_layers": 2}
_ROUTER = "the softmax follows a projection"
_PICKED = "the largest of some scores: a gate"
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}


def _decoder(
    name: str,
    owner: str,
    model: str,
    config: str,
    *masks: str,
    options: dict[str, Any],
    implementations: tuple[str, ...] = BOTH,
    refused: tuple[str, ...] = (),
    **facts: Any,
) -> Family:
    sites = tuple(
        Attention(owner.format(i), mask=m, **facts) for i, m in enumerate(masks or (CAUSAL,))
    )
    return Family(name, of(model, config, **options), text, sites, implementations, refused)


def _rotary(
    name: str,
    model: str,
    *masks: str,
    implementations: tuple[str, ...] = BOTH,
    refused: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
    config: str = "",
    base: Any = GROUPED,
    **options: Any,
) -> Family:
    """The common design: rotary embedding, grouped heads, one module per attention."""
    known = {"rotary_dim": 16, "position": "rotary", "heads": (4, 2)}
    return _decoder(
        name,
        "model.layers.{}.self_attn",
        f"{model}ForCausalLM",
        config or f"{model}Config",
        *masks,
        options={**base, "num_hidden_layers": max(len(masks), 1), **options},
        implementations=implementations,
        refused=refused,
        **{**known, **(facts or {})},
    )


DECODERS: tuple[Family, ...] = (
    _rotary("llama", "Llama", CAUSAL, CAUSAL),
    _rotary("mistral", "Mistral", _LOCAL, sliding_window=8),
    _rotary("qwen2", "Qwen2"),
    _rotary("qwen3", "Qwen3", head_dim=16, facts={"qk_norm": True}),
    _rotary(
        "gemma2",
        "Gemma2",
        _LOCAL,
        CAUSAL,
        head_dim=16,
        sliding_window=8,
        implementations=EAGER,
        facts={"scale": 0.0625, "softcap": 50.0},
    ),
    _rotary(
        "gemma3",
        "Gemma3",
        _LOCAL,
        CAUSAL,
        config="Gemma3TextConfig",
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        facts={"scale": 0.0625, "qk_norm": True},
    ),
    _rotary("phi3", "Phi3", facts={"fused": True}),
    _rotary("mixtral", "Mixtral", num_local_experts=4, refused=(_ROUTER,)),
    _rotary(
        "qwen3-moe",
        "Qwen3Moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        facts={"qk_norm": True},
        refused=(_ROUTER,),
    ),
    _rotary("starcoder2", "Starcoder2", _LOCAL, sliding_window=8),
    _rotary("stablelm", "StableLm", facts={"rotary_dim": 4}),
    _rotary("olmo2", "Olmo2", facts={"qk_norm": True}),
    _rotary("cohere", "Cohere"),
    _rotary("granite", "Granite", attention_multiplier=0.3, facts={"scale": 0.3}),
    _decoder(
        "phi",
        "model.layers.{}.self_attn",
        "PhiForCausalLM",
        "PhiConfig",
        options={**GROUPED},
        heads=(4, 2),
        rotary_dim=8,
        position="rotary",
    ),
    _rotary(
        "gpt-oss",
        "GptOss",
        _LOCAL,
        CAUSAL,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        implementations=EAGER,
        facts={"sinks": True},
        refused=2 * (_PICKED,),
    ),
    _rotary(
        "deepseek-v3",
        "DeepseekV3",
        base=BASE,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        facts={
            "heads": (4, 4),
            "widths": (24, 12),
            "scale": 24**-0.5,
            "rotary_dim": 8,
            "fused": True,
        },
    ),
    Family(
        "llama4",
        of(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **{**GROUPED, **_TWO},
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=4,
            attention_chunk_size=8,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
        ),
        text,
        (
            Attention(
                "model.layers.0.self_attn",
                _CHUNKS,
                (4, 2),
                rotary_dim=16,
                position="rotary",
                qk_norm=True,
            ),
            Attention("model.layers.1.self_attn", CAUSAL, (4, 2)),
        ),
    ),
    _decoder(
        "gpt2",
        "transformer.h.{}.attn",
        "GPT2LMHeadModel",
        "GPT2Config",
        options={**_GPT, **SPECIAL},
        fused=True,
    ),
    _decoder(
        "gptneox",
        "gpt_neox.layers.{}.attention",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        options={**BASE},
        rotary_dim=4,
        position="rotary",
        fused=True,
    ),
    _decoder(
        "gpt-j",
        "transformer.h.{}.attn",
        "GPTJForCausalLM",
        "GPTJConfig",
        options={**_GPT, **SPECIAL, "rotary_dim": 8},
        implementations=EAGER,
        rotary_dim=8,
        position="rotary",
    ),
    _decoder(
        "codegen",
        "transformer.h.{}.attn",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        options={**_GPT, **SPECIAL, "rotary_dim": 8, "n_ctx": 64},
        implementations=EAGER,
        rotary_dim=8,
        position="rotary",
        fused=True,
    ),
    _decoder(
        "gpt-bigcode",
        "transformer.h.{}.attn",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        options={**_GPT, **SPECIAL},
        heads=(4, 1),
        fused=True,
    ),
    _decoder(
        "opt",
        "model.decoder.layers.{}.self_attn",
        "OPTForCausalLM",
        "OPTConfig",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
            **SPECIAL,
        },
        scale=1.0,
        prescaled=0.25,
    ),
    _decoder(
        "bloom",
        "transformer.h.{}.self_attention",
        "BloomForCausalLM",
        "BloomConfig",
        options={"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 1, "n_head": 4, **SPECIAL},
        implementations=EAGER,
        position="alibi",
        fused=True,
    ),
    _decoder(
        "mpt",
        "transformer.blocks.{}.attn",
        "MptForCausalLM",
        "MptConfig",
        options={
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            **SPECIAL,
        },
        implementations=EAGER,
        position="alibi",
        fused=True,
    ),
    *(
        _decoder(
            name,
            "transformer.h.{}.self_attention",
            "FalconForCausalLM",
            "FalconConfig",
            options={
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                **SPECIAL,
                **options,
            },
            fused=True,
            **facts,
        )
        for name, options, facts in (
            ("falcon-rotary", {}, {"heads": (4, 1), "rotary_dim": 16, "position": "rotary"}),
            ("falcon-alibi", {"alibi": True, "multi_query": False}, {"position": "alibi"}),
        )
    ),
    Family(
        "decision-transformer",
        of(
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            state_dim=5,
            act_dim=3,
            hidden_size=64,
            n_layer=1,
            n_head=4,
            n_positions=128,
            max_ep_len=32,
            vocab_size=1,
        ),
        lambda: _trajectory(),
        layers("encoder.h.{}.attn", fused=True),
    ),
)


def _trajectory() -> dict[str, Any]:
    import torch

    rows, steps = 2, 9
    return {
        "states": torch.randn(rows, steps, 5),
        "actions": torch.randn(rows, steps, 3),
        "rewards": torch.randn(rows, steps, 1),
        "returns_to_go": torch.randn(rows, steps, 1),
        "timesteps": torch.arange(steps).expand(rows, steps).contiguous(),
        "attention_mask": torch.ones(rows, steps, dtype=torch.long),
    }
