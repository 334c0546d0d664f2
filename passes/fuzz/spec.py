"""What a generated program computes: the facts that must be found, whatever the spelling."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch

MaskKind = Literal["none", "causal", "window", "local", "chunk"]
Position = Literal["none", "half", "interleaved", "alibi"]

CHANNELS = 32
"""Width of the stream into and out of every program."""


@dataclass(frozen=True)
class Spec:
    """One attention function.

    Attributes:
        heads, kv_heads, width, value_width: head counts and channels per head.
        mask, size: structure of the mask; `size` counts tokens of a window or chunk.
        padding: the program takes a (batch, keys) input that is 0 at padded keys.
        scale: factor on q.k.
        softcap: cap * tanh(scores / cap) after scaling, or None.
        position: rotary embedding over `rotary_dim` channels (two channel orders), or ALiBi.
        norm: RMS normalisation of queries and keys.
        cross: keys and values come from a second input of another length.
        dropout: probability on the attention weights; the program is captured in training mode.
        sinks: a learned score per head takes part in the softmax and is dropped after it.
    """

    heads: int = 4
    kv_heads: int = 4
    width: int = 8
    value_width: int = 8
    mask: MaskKind = "none"
    size: int = 0
    padding: bool = False
    scale: float = 8**-0.5
    softcap: float | None = None
    position: Position = "none"
    rotary_dim: int = 0
    norm: bool = False
    cross: bool = False
    dropout: float = 0.0
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def seen(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Which keys j a query i may see, apart from padding; bool, of broadcast shape."""
        if self.mask == "causal":
            return j <= i
        if self.mask == "window":
            return (j <= i) & (i - j < self.size)
        if self.mask == "local":
            return (i - j).abs() <= self.size
        if self.mask == "chunk":
            same = i.div(self.size, rounding_mode="floor") == j.div(
                self.size, rounding_mode="floor"
            )
            return (j <= i) & same
        return (i == i) & (j == j)


def random_spec(rng: random.Random) -> Spec:
    """A canonical attention: grouped, cross, masked, positioned, capped in any combination."""
    heads, kv_heads = rng.choice([(4, 4), (4, 4), (4, 2), (6, 2), (4, 1), (2, 2)])
    width = rng.choice([8, 16])
    cross = rng.random() < 0.15
    kinds: tuple[MaskKind, ...] = ("none", "causal", "causal", "causal", "window", "local", "chunk")
    kind: MaskKind = "none" if cross else rng.choice(kinds)
    places: tuple[Position, ...] = ("none", "none", "half", "half", "interleaved", "alibi")
    position: Position = "none" if cross else rng.choice(places)
    rotary = position in ("half", "interleaved")
    return Spec(
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        value_width=width if rng.random() < 0.8 else 12,
        mask=kind,
        size={"window": rng.choice([3, 4, 9]), "local": 2, "chunk": rng.choice([3, 5])}.get(
            kind, 0
        ),
        padding=rng.random() < 0.4,
        scale=width**-0.5 if rng.random() < 0.8 else rng.choice([1.0, 0.2, 1 / width]),
        softcap=rng.choice([5.0, 30.0]) if rng.random() < 0.15 else None,
        position=position,
        rotary_dim=(width if rng.random() < 0.7 else width // 2) if rotary else 0,
        norm=rng.random() < 0.2,
        cross=cross,
        dropout=0.1 if rng.random() < 0.15 else 0.0,
    )
