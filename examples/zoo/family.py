"""What the zoo says about a model: how it is built and called, and the attention it truly has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, LENGTH, TARGETS = 99, 12, 7
BOTH = ("eager", "sdpa")
EAGER = ("eager",)
CAUSAL = "causal & key_padding"
PADDED = "key_padding"

Builder = Callable[[str], nn.Module]
Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Attention:
    """One attention block, written down by hand from the family's own definition.

    Attributes:
        owner: path of the module that holds it.
        mask: what `Mask.describe` must say.
        heads: query heads and key/value heads.
        widths: channels of keys and of values in each head.
        scale: factor between q.k, as they meet, and the logits.
        prescaled: factor on the query before its heads are split.
        position: rotary, alibi, relative_bias or external.
        cross: keys and values come from another sequence than the queries.
        sinks: a learned logit per head takes part in the softmax and in nothing else.
    """

    owner: str
    mask: str = CAUSAL
    heads: tuple[int, int] = (4, 4)
    widths: tuple[int, int] = (16, 16)
    scale: float = 0.25
    prescaled: float = 1.0
    softcap: float | None = None
    rotary_dim: int = 0
    position: str = "external"
    qk_norm: bool = False
    fused: bool = False
    cross: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class Family:
    """A tiny random model of one architecture.

    Attributes:
        build: makes the model for an attention implementation, weights as they come.
        inputs: keyword arguments of one call; lengths differ wherever two sequences meet.
        sites: its attention, in the order it runs.
        implementations: those the architecture offers.
        refused: what else runs a softmax or an attention operator, as part of the reason that must
            be given for it, in order: routers, pooling, sparse attention in blocks.
        training: the model can be captured in training mode.
        half: the model runs in bfloat16.
        untraceable: part of the reason why the family cannot be captured at all, or "".
        silent: attention that calls no softmax: written with exponentials.
    """

    name: str
    build: Builder
    inputs: Inputs
    sites: tuple[Attention, ...]
    implementations: tuple[str, ...] = BOTH
    refused: tuple[str, ...] = ()
    training: bool = True
    half: bool = True
    untraceable: str = ""
    silent: int = 0


def of(model: str, config: str, **options: Any) -> Builder:
    """Builds `transformers.model(transformers.config(...))` with an attention implementation."""

    def build(implementation: str) -> nn.Module:
        make = getattr(transformers, config)
        values = {k: v() if callable(v) else v for k, v in options.items()}
        chosen: Any = implementation
        if "backbone_config" in values:  # a convolutional backbone has no attention to choose
            chosen = {"": implementation, "backbone_config": "eager"}
        return getattr(transformers, model)(make(**values, attn_implementation=chosen))

    return build


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give parameters that start constant (zero biases, unit norms) values of their own.

    A bias table that is all zero, or a sink that never counts, would hide a wrong reading.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def layers(owner: str, *indices: int, **facts: Any) -> tuple[Attention, ...]:
    """The same attention in several layers; `owner` has the index as {}."""
    return tuple(Attention(owner.format(i), **facts) for i in indices or (0,))


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """(rows, length) random ids without special ones."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def text() -> dict[str, Any]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def translation() -> dict[str, Any]:
    """An encoder's and a decoder's tokens with the masks of both."""
    target = tokens(length=TARGETS)
    return {
        **text(),
        "decoder_input_ids": target,
        "decoder_attention_mask": torch.ones_like(target),
    }


def pixels(size: int = 32) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def hidden(*names: str) -> Inputs:
    """(2, LENGTH, 64) activations for each name."""
    return lambda: {name: torch.randn(2, LENGTH, 64) for name in names or ("x",)}


BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Mapping[str, Any] = {**BASE, "num_key_value_heads": 2}
SPECIAL: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
