"""A tiny Llama and a hand-made student of it, in the shape that a rewrite produces."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from tiny_models import small_llama
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from rewriter.ir.mask import Causal, KeyPadding, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Projection, Scale, Source
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions

VOCABULARY = 96


class StandInOptions(MixerOptions):
    """None."""


class StandInMixer(Mixer):
    """Causal attention over learned features exp(x W - max), float32 inside."""

    info: ClassVar[MixerInfo] = MixerInfo(
        "stand_in", "linear", "distilled", "", "", "", frozenset({"causal"})
    )
    Options = StandInOptions
    branches = ("far", "near")

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        width = site.heads.key_dim
        self.query_map = nn.Parameter(torch.eye(width).repeat(site.heads.query, 1, 1))
        self.key_map = nn.Parameter(torch.eye(width).repeat(site.heads.query, 1, 1))

    def forward(
        self, q: Any, k: Any, v: Any, terms: Any = (), cache: Any = None, need_weights: bool = False
    ) -> tuple[torch.Tensor, None]:
        assert cache is None
        k = k.repeat_interleave(self.site.heads.group, 1).float()
        values = v.repeat_interleave(self.site.heads.group, 1).float()
        fq = (q.float() @ self.query_map.float() * self.site.scale).softmax(-1)
        fk = (k @ self.key_map.float() * self.site.scale).softmax(-1)
        scores = fq @ fk.transpose(-1, -2)
        n = q.shape[-2]
        age = torch.arange(n)[:, None] - torch.arange(n)
        allowed = age >= 0
        if "far" in self.disabled:
            allowed = allowed & (age < 4)
        if "near" in self.disabled:
            allowed = allowed & ((age >= 4) | (age == 0))
        scores = scores * allowed
        out = scores @ values / scores.sum(-1, keepdim=True).clamp_min(1e-6)
        return out.to(v.dtype), None


class StandInAttention(LlamaAttention):  # type: ignore[misc]
    """The original module with its softmax replaced by `core`."""

    def forward(
        self,
        hidden_states: Any,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = self.core(q, k, v, (attention_mask,))
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def tiny_teacher(seed: int = 0) -> LlamaForCausalLM:
    return small_llama(
        seed,
        vocab_size=VOCABULARY,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that attention moves the logits
    )


def tiny_student(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A student that shares every parameter, and every module but the rewritten ones."""
    memo: dict[int, Any] = {id(p): p for p in teacher.parameters()}
    student = copy.deepcopy(teacher, memo)
    for index, layer in enumerate(student.model.layers):
        original = teacher.model.layers[index].self_attn
        site = AttentionSite(
            fqn=f"model.layers.{index}.self_attn",
            index=index,
            heads=HeadGroups(4, 2, 8, 8),
            score=(Scale(8**-0.5),),
            terms=("mask",),
            mask=Mask((Causal(), KeyPadding())),
            spelling="sdpa",
            source=Source("scaled_dot_product_attention"),
            projections={
                part: Projection(f"model.layers.{index}.self_attn.{part[0]}_proj")
                for part in ("query", "key", "value", "output")
            },
        )
        owner = StandInAttention.__new__(StandInAttention)
        owner.__dict__ = dict(original.__dict__)
        owner._modules = dict(original._modules)  # the very same child modules as the teacher
        owner.add_module("core", StandInMixer(site, StandInOptions(), index))
        layer.self_attn = owner
    return student


def token_rows(count: int = 12, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)
