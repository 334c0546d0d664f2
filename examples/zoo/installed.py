"""Models of other people's packages: how each is built small, and how it is called.

Nothing of these packages is needed by anything else here; a package that is not installed is left
out. Written down by hand is only how many of the counted softmaxes are no attention over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

LENGTH = 12


@dataclass(frozen=True)
class Case:
    """A small random model of a package.

    Attributes:
        package: the distribution that must be installed.
        build: makes the model.
        inputs: positional or keyword arguments of one call.
        other: counted softmaxes that are no attention over tokens (routers, pooling, gates).
        silent: attention that calls no function which is counted.
        language: a causal language model: a sliding window must be possible in every block.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    other: int = 0
    silent: int = 0
    language: bool = False


def made(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Builds `module.name(*args, **options)` from 'module:name'."""

    def build() -> nn.Module:
        module, _, name = path.partition(":")
        made: Any = import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
        out: nn.Module = made(*args, **options)
        return out

    return build


def image(size: int = 32, *, channels: int = 3) -> Callable[[], Any]:
    return lambda: (torch.randn(2, channels, size, size),)


def ids(vocabulary: int = 99) -> Callable[[], Any]:
    return lambda: (torch.randint(4, vocabulary, (2, LENGTH)),)


def activations(width: int = 64, length: int = LENGTH) -> Callable[[], Any]:
    return lambda: (torch.randn(2, length, width),)


class Wrapped(nn.Module):
    """A module called through a function, for those whose call takes or gives what is no tensor."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self._call = inner, call

    def forward(self, *args: Any) -> Any:
        return self._call(self.inner, *args)


def called(build: Callable[[], nn.Module], call: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Wrapped(build(), call)


def _timm(name: str, size: int = 32, other: int = 0, **options: Any) -> Case:
    build = made("timm:create_model", name, pretrained=False, num_classes=7, **options)
    return Case(f"timm {name}", "timm", build, image(size), other=other)


_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 4,
}
_TIMM = (
    _timm("vit_tiny_patch16_224", **_VIT),
    _timm("vit_base_patch16_siglip_224", **_VIT),
    _timm("vit_relpos_small_patch16_224", **_VIT),
    _timm("vit_base_patch16_rope_reg1_gap_256", **_VIT),
    _timm("deit3_small_patch16_224", **_VIT),
    _timm("deit_tiny_distilled_patch16_224", **_VIT),
    _timm("beit_base_patch16_224", **_VIT),
    _timm("beitv2_base_patch16_224", **_VIT),
    _timm("eva02_tiny_patch14_224", **_VIT),
    _timm("cait_xxs24_224", **_VIT),
    _timm("xcit_nano_12_p16_224", img_size=32, embed_dim=64, depth=1, num_heads=4, other=1),
    _timm("flexivit_small", **_VIT),
    _timm("naflexvit_base_patch16_gap", patch_size=8, embed_dim=64, depth=1, num_heads=4),
    _timm(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=32,
        size=64,
        depths=(2, 1),
        num_heads=(2, 4),
    ),
    _timm(
        "swinv2_tiny_window8_256",
        img_size=64,
        window_size=4,
        embed_dim=32,
        size=64,
        depths=(2, 1),
        num_heads=(2, 4),
    ),
    _timm("maxvit_rmlp_pico_rw_256", img_size=64, size=64),
    _timm("coatnet_rmlp_nano_rw_224", img_size=64, size=64),
    _timm("pvt_v2_b0", size=64),
    _timm("twins_pcpvt_small", size=64, img_size=64),
    _timm("twins_svt_small", size=64, img_size=64),
    _timm("convit_tiny", **{**_VIT, "local_up_to_layer": 0}),
    _timm("crossvit_tiny_240", size=240),
    _timm("levit_128s", size=224),
    _timm("mobilevit_xxs", size=64),
    _timm("mobilevitv2_050", size=64, other=9),
    _timm("efficientformer_l1", size=224),
    _timm("edgenext_xx_small", size=64, other=3),
    _timm("gcvit_xxtiny", size=64, img_size=64),
    _timm("davit_tiny", size=64, other=6),
    _timm("hiera_tiny_224", size=64, img_size=64),
    _timm("mvitv2_tiny", size=64, img_size=64),
    _timm("nest_tiny", size=64, img_size=64),
    _timm("pit_ti_224", size=64, img_size=64),
    _timm("coat_lite_tiny", size=64, img_size=64),
    _timm("volo_d1_224", size=64, img_size=64),
    _timm("visformer_tiny", size=64, img_size=64),
    _timm("tnt_s_legacy_patch16_224", size=32, img_size=32, embed_dim=64, depth=1, num_heads=4),
    _timm("caformer_s18", size=64),
    _timm(
        "samvit_base_patch16",
        size=64,
        img_size=64,
        embed_dim=64,
        depth=2,
        num_heads=4,
        global_attn_indexes=(1,),
    ),
    _timm("botnet26t_256", size=64, img_size=64),
    _timm("halonet26t", size=64),
    _timm("lambda_resnet26t", size=64),
    _timm("sequencer2d_s", size=64, img_size=64),
    _timm("mixer_s32_224", size=64, img_size=64),
    _timm("efficientvit_b0", size=64),
    _timm("efficientvit_m0", size=64, img_size=64),
    _timm("resnest14d", size=64),
    _timm("skresnet18", size=64),
    _timm("aimv2_large_patch14_224", **_VIT),
    _timm("vitamin_small_224", size=64, img_size=64),
    _timm("focalnet_tiny_srf", size=64),
    _timm("nextvit_small", size=64),
    _timm("fastvit_sa12", size=64),
    _timm("repvit_m0_9", size=64),
)


def _x(name: str, *, decoder: bool = True, **options: Any) -> Case:
    """A language model or an encoder of x-transformers with one of its options."""
    kind = "Decoder" if decoder else "Encoder"
    outer = {k: options.pop(k) for k in ("num_memory_tokens", "l2norm_embed") if k in options}
    silent = options.pop("silent", 0)
    other = options.pop("other", 0)
    window = options.pop("window", decoder)

    def build() -> nn.Module:
        x: Any = import_module("x_transformers")
        layers = getattr(x, kind)(dim=64, depth=1, heads=4, attn_dim_head=16, **options)
        out: nn.Module = x.TransformerWrapper(
            num_tokens=99, max_seq_len=64, attn_layers=layers, **outer
        )
        return out

    return Case(f"x-transformers {name}", "x-transformers", build, ids(), other, silent, window)


_X = (
    _x("plain"),
    _x("encoder", decoder=False),
    _x("flash", attn_flash=True),
    _x("rotary", rotary_pos_emb=True),
    _x("xpos", rotary_xpos=True),
    _x("alibi", alibi_pos_bias=True),
    _x("alibi flash", alibi_pos_bias=True, attn_flash=True),
    _x("t5 bias", rel_pos_bias=True),
    _x("dynamic bias", dynamic_pos_bias=True),
    _x("kv heads", attn_kv_heads=2),
    _x("one kv head", attn_one_kv_head=True),
    _x("kv heads flash", attn_kv_heads=2, attn_flash=True),
    _x("qk norm", attn_qk_norm=True),
    _x("qk rmsnorm", attn_qk_rmsnorm=True),
    _x("memory keys", attn_num_mem_kv=3),
    _x("zero key", attn_add_zero_kv=True),
    _x("learned sink", attn_head_learned_sink=True),
    _x("talking heads before", attn_pre_talking_heads=True),
    _x("talking heads after", attn_post_talking_heads=True),
    _x("sparse top k", attn_sparse_topk=4),
    _x("sigmoid", attn_sigmoid=True),
    _x("gate values", attn_gate_values=True),
    _x("gate value heads", attn_gate_value_heads=True),
    _x("head scale", attn_head_scale=True),
    _x("on attention", attn_on_attn=True),
    _x("softclamp", attn_softclamp_logits=True),
    _x("local window", attn_max_attend_past=4),
    _x("residual scores", residual_attn=True),
    _x("l2 distance", attn_l2_distance=True),
    _x("hard", attn_hard=True),
    _x("selective", attn_selective=True),
    _x("CoPE", attn_use_cope=True),
    _x("data dependent alibi", attn_data_dependent_alibi=True),
    _x("laser", attn_laser=True),
    _x("latent kv", attn_use_latent_kv=True, attn_dim_latent_kv=16),
    _x("hyper connections", num_residual_streams=2),
    _x("GLU", ff_glu=True, ff_swish=True),
    _x("macaron", macaron=True),
    _x("shifted tokens", shift_tokens=1),
    _x("memory tokens", num_memory_tokens=3, window=False),
    _x("value residual", add_value_residual=True),
    _x("polar", polar_pos_emb=True),
    _x("relative projected", attn_use_rel_proj_pos_bias=True),
    _x("inverted", attn_inverted_attention=True, decoder=False),
)


def _vp(module: str, size: int = 32, name: str = "ViT", other: int = 0, **options: Any) -> Case:
    build = made(f"vit_pytorch.{module}:{name}", num_classes=7, **options)
    return Case(f"vit-pytorch {module}", "vit-pytorch", build, image(size), other)


_P: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "dim": 64,
    "depth": 1,
    "heads": 4,
    "mlp_dim": 96,
}
_SMALL = {k: v for k, v in _P.items() if k not in ("image_size", "patch_size")}
_VIT_PYTORCH = (
    _vp("vit", **_P),
    _vp("simple_vit", name="SimpleViT", **_P),
    _vp("simple_vit_with_qk_norm", name="SimpleViT", **_P),
    _vp("cait", name="CaiT", cls_depth=1, **_P),
    _vp("xcit", name="XCiT", cls_depth=1, other=1, **_P),
    _vp("deepvit", name="DeepViT", **_P),
    _vp("parallel_vit", **_P),
    _vp("vit_for_small_dataset", **_P),
    _vp("local_vit", name="LocalViT", **_P),
    _vp("rvt", name="RvT", **_P),
    _vp("normalized_vit", name="nViT", **_P),
    _vp("learnable_memory_vit", **_P),
    _vp("simple_flash_attn_vit", name="SimpleViT", **_P),
    _vp("simple_vit_with_value_residual", name="SimpleViT", **_P),
    _vp("simple_vit_with_register_tokens", name="SimpleViT", **_P),
    _vp("vit_with_patch_merger", **{**_P, "depth": 2}),
    _vp("cvt", size=64, name="CvT", s2_depth=1, s3_depth=1),
    _vp("cross_vit", size=32, name="CrossViT", image_size=32, sm_dim=32, lg_dim=64, depth=1,
        sm_patch_size=8, lg_patch_size=16),
    _vp("twins_svt", size=224, name="TwinsSVT", s1_emb_dim=16, s2_emb_dim=16, s3_emb_dim=16,
        s4_emb_dim=16, s3_depth=1, s4_depth=1),
    _vp("max_vit", size=224, name="MaxViT", dim=16, depth=(1, 1)),
    _vp("mobile_vit", size=64, name="MobileViT", image_size=(64, 64), dims=[32, 32, 32],
        channels=[16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 64], depths=(1, 1, 1)),
    _vp("t2t", size=32, name="T2TViT", image_size=32, t2t_layers=((7, 4), (3, 2)), **_SMALL),
    _vp("pit", name="PiT", **{**_P, "depth": (1, 1)}),
    _vp("levit", size=64, name="LeViT", image_size=64, dim=(32, 32), depth=1, heads=(2, 2),
        stages=2, mlp_mult=2),
    _vp("nest", name="NesT", image_size=32, patch_size=4, dim=32, heads=2, num_hierarchies=2,
        block_repeats=(1, 1)),
)  # fmt: skip
CASES: tuple[Case, ...] = (*_TIMM, *_X, *_VIT_PYTORCH)
