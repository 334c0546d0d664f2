"""More packages of other people: diffusion, vision, speech, proteins, language, other attention."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from zoo.installed import Case, activations, called, ids, image, made


def noise(*shapes: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _tuple(build: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    """Called with names for its arguments, and asked for tuples."""

    def call(model: nn.Module, *args: torch.Tensor) -> Any:
        given: dict[str, Any] = dict(zip(names, args, strict=True))
        return model(**given, return_dict=False)[0]

    return called(build, call)


def _steps() -> torch.Tensor:
    return torch.tensor([3, 5])


_TEXT = (2, 7, 32)
_BLOCKS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_LATENT: dict[str, Any] = {**_BLOCKS, "sample_size": 8, "patch_size": 2, "in_channels": 4}
_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "sample_size": 8,
}
_DIFFUSERS = (
    Case("diffusers UNet2DConditionModel", "diffusers", _tuple(
        made("diffusers:UNet2DConditionModel", **_UNET, cross_attention_dim=32,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        "sample", "timestep", "encoder_hidden_states"),
        lambda: (torch.randn(2, 4, 8, 8), _steps(), torch.randn(_TEXT))),
    Case("diffusers UNet2DModel", "diffusers", _tuple(
        made("diffusers:UNet2DModel", **_UNET,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D")), "sample", "timestep"),
        lambda: (torch.randn(2, 3, 8, 8), _steps())),
    Case("diffusers AutoencoderKL", "diffusers", _tuple(
        made("diffusers:AutoencoderKL", block_out_channels=(16,), norm_num_groups=4,
             sample_size=8), "sample"), noise((2, 3, 8, 8))),
    Case("diffusers DiT", "diffusers", _tuple(
        made("diffusers:DiTTransformer2DModel", **_LATENT, out_channels=4, norm_num_groups=4,
             num_embeds_ada_norm=10), "hidden_states", "timestep", "class_labels"),
        lambda: (torch.randn(2, 4, 8, 8), _steps(), torch.tensor([1, 2]))),
    Case("diffusers SD3", "diffusers", _tuple(
        made("diffusers:SD3Transformer2DModel", **_LATENT, out_channels=4, pos_embed_max_size=8,
             joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32),
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        lambda: (torch.randn(2, 4, 8, 8), torch.randn(_TEXT), torch.randn(2, 32), _steps())),
    Case("diffusers Flux", "diffusers", _tuple(
        made("diffusers:FluxTransformer2DModel", **{**_BLOCKS, "num_layers": 1}, in_channels=4,
             num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32,
             axes_dims_rope=(4, 4, 8)),
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids",
        "txt_ids"),
        lambda: (torch.randn(2, 16, 4), torch.randn(_TEXT), torch.randn(2, 32), _steps() / 10,
                 torch.arange(16.0)[:, None].expand(16, 3), torch.zeros(7, 3))),
    Case("diffusers Wan", "diffusers", _tuple(
        made("diffusers:WanTransformer3DModel", **{**_BLOCKS, "attention_head_dim": 12},
             in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32),
        "hidden_states", "timestep", "encoder_hidden_states"),
        lambda: (torch.randn(2, 4, 2, 8, 8), _steps(), torch.randn(2, 7, 16))),
)  # fmt: skip


def _swin(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        found: Any = import_module(module)
        kinds = {k: getattr(found, v) for k, v in options.items() if isinstance(v, str)}
        rest = {k: v for k, v in options.items() if not isinstance(v, str)}
        out: nn.Module = getattr(found, name)(
            embed_dim=32, depths=[2, 1], num_heads=[2, 4], num_classes=7,
            stochastic_depth_prob=0.0, **kinds, **rest,
        )  # fmt: skip
        return out

    return build


_FLAT: dict[str, Any] = {"patch_size": [4, 4], "window_size": [4, 4]}
_TORCHVISION = (
    Case("torchvision ViT", "torchvision", made(
        "torchvision.models:VisionTransformer", image_size=32, patch_size=8, num_layers=2,
        num_heads=4, hidden_dim=64, mlp_dim=96, num_classes=7), image()),
    Case("torchvision Swin", "torchvision", _swin(
        "torchvision.models.swin_transformer", "SwinTransformer", **_FLAT), image(64)),
    Case("torchvision SwinV2", "torchvision", _swin(
        "torchvision.models.swin_transformer", "SwinTransformer", **_FLAT,
        block="SwinTransformerBlockV2", downsample_layer="PatchMergingV2"), image(64)),
    Case("torchvision Swin3D", "torchvision", _swin(
        "torchvision.models.video.swin_transformer", "SwinTransformer3d", patch_size=[2, 4, 4],
        window_size=[2, 4, 4]), noise((2, 3, 8, 32, 32))),
    Case("torchvision MaxViT", "torchvision", made(
        "torchvision.models:MaxVit", input_size=(64, 64), stem_channels=16, partition_size=2,
        block_channels=[16, 32], block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.0,
        num_classes=7), image(64)),
)  # fmt: skip


def _clip() -> nn.Module:
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 4, "layers": 2}
    return made("open_clip.model:CLIP", embed_dim=32, vision_cfg=vision, text_cfg=text)()


def _proteins() -> nn.Module:
    esm: Any = import_module("esm")
    letters = esm.data.Alphabet.from_architecture("ESM-1b")
    out: nn.Module = esm.model.esm2.ESM2(2, 64, 4, letters, token_dropout=False)
    return out


_OF_DOMAINS = (
    Case("open_clip CLIP", "open_clip_torch", _clip,
         lambda: (torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 12)))),
    Case("segment-anything image encoder", "segment_anything", made(
        "segment_anything.modeling.image_encoder:ImageEncoderViT", img_size=64, patch_size=8,
        embed_dim=64, depth=2, num_heads=4, out_chans=32, use_rel_pos=True, window_size=4,
        global_attn_indexes=(1,)), image(64)),
    Case("segment-anything two-way decoder", "segment_anything", made(
        "segment_anything.modeling.transformer:TwoWayTransformer", depth=2, embedding_dim=64,
        num_heads=4, mlp_dim=96), noise((2, 64, 4, 4), (2, 64, 4, 4), (2, 5, 64))),
    Case("fair-esm ESM2", "fair-esm", called(_proteins, lambda m, x: m(x)["logits"]),
         lambda: (torch.randint(4, 24, (2, 12)),)),
    Case("conformer", "conformer", made(
        "conformer:Conformer", dim=64, depth=1, dim_head=16, heads=4, ff_mult=2,
        conv_kernel_size=7), activations()),
    Case("tab-transformer FT", "tab-transformer-pytorch", made(
        "tab_transformer_pytorch:FTTransformer", categories=(5, 6, 7), num_continuous=4, dim=32,
        dim_out=1, depth=1, heads=4, dim_head=8),
        lambda: (torch.randint(0, 5, (2, 3)), torch.randn(2, 4))),
)  # fmt: skip

_GPT: dict[str, Any] = {"vocab_size": 99, "num_layers": 2, "num_heads": 4, "embed_dim": 64,
                        "max_seq_len": 64, "intermediate_dim": 96}  # fmt: skip


def _tune(name: str, function: str, **options: Any) -> Case:
    build = made(f"torchtune.models.{name}:{function}", **{**_GPT, **options})
    return Case(f"torchtune {function}", "torchtune", build, ids(), language=True)


def _lit(name: str, other: int = 0, **options: Any) -> Case:
    def build() -> nn.Module:
        litgpt: Any = import_module("litgpt")
        sizes = {"block_size": 64, "vocab_size": 99, "padded_vocab_size": 99, "n_layer": 2,
                 "n_head": 4, "n_embd": 64, "intermediate_size": 96}  # fmt: skip
        out: nn.Module = litgpt.GPT(litgpt.Config(**{**sizes, **options}))
        return out

    return Case(f"litgpt {name}", "litgpt", build, ids(), other, language=True)


_LLAMA: dict[str, Any] = {"rotary_percentage": 1.0, "n_query_groups": 2, "bias": False,
                          "norm_class_name": "RMSNorm", "parallel_residual": False}  # fmt: skip
_LANGUAGE = (
    _tune("llama3", "llama3", num_kv_heads=2),
    _tune("gemma", "gemma", num_kv_heads=1, head_dim=16),
    _tune("gemma2", "gemma2", num_kv_heads=2, head_dim=16, hidden_capping_value=50.0,
          final_capping_value=30.0, sliding_window_size=5),
    _tune("qwen2", "qwen2", num_kv_heads=2),
    _lit("pythia", rotary_percentage=0.25),
    _lit("llama", **_LLAMA, mlp_class_name="LLaMAMLP"),
    _lit("gemma 2", **_LLAMA, mlp_class_name="GemmaMLP", attention_logit_softcapping=50.0,
         final_logit_softcapping=30.0, sliding_window_size=5, sliding_window_indices=[1, 0],
         attention_scores_scalar=16),
    _lit("experts", 2, **_LLAMA, mlp_class_name="LLaMAMoE", moe_intermediate_size=96, n_expert=4,
         n_expert_per_token=2),
)  # fmt: skip

_LM: dict[str, Any] = {"num_tokens": 99, "dim": 64, "depth": 1, "heads": 4}
_HEAD: dict[str, Any] = {**_LM, "dim_head": 16, "max_seq_len": 64}
_SETS: dict[str, Any] = {"depth": 1, "num_latents": 8, "latent_dim": 32, "cross_heads": 1,
                         "latent_heads": 4, "cross_dim_head": 16,
                         "latent_dim_head": 16}  # fmt: skip
_OTHERS = (
    Case("perceiver", "perceiver-pytorch", made(
        "perceiver_pytorch:Perceiver", **_SETS, num_freq_bands=2, max_freq=4.0, input_channels=3,
        num_classes=7, self_per_cross_attn=1), noise((2, 8, 8, 3))),
    Case("perceiver IO", "perceiver-pytorch", called(
        made("perceiver_pytorch:PerceiverIO", **_SETS, dim=32, queries_dim=32, logits_dim=9),
        lambda m, x, y: m(x, None, y)), noise((2, 12, 32), (2, 5, 32))),
    Case("performer", "performer-pytorch", made(
        "performer_pytorch:PerformerLM", **_HEAD, nb_features=16), ids()),
    Case("performer local heads", "performer-pytorch", made(
        "performer_pytorch:PerformerLM", **_HEAD, nb_features=16, local_attn_heads=2,
        local_window_size=4), ids()),
    Case("linformer", "linformer", made(
        "linformer:LinformerLM", **_LM, seq_len=12, k=6), ids()),
    Case("nystrom-attention", "nystrom-attention", made(
        "nystrom_attention:Nystromformer", dim=64, dim_head=16, heads=4, depth=1,
        num_landmarks=4, pinv_iterations=3), activations()),
    Case("local-attention", "local-attention", made(
        "local_attention:LocalTransformer", **_HEAD, causal=True, local_attn_window_size=4),
        ids()),
    Case("linear-attention-transformer", "linear-attention-transformer", made(
        "linear_attention_transformer:LinearAttentionTransformerLM", **_LM, max_seq_len=64),
        ids(), other=2),
)  # fmt: skip
LIBRARIES: tuple[Case, ...] = (*_DIFFUSERS, *_TORCHVISION, *_OF_DOMAINS, *_LANGUAGE, *_OTHERS)
