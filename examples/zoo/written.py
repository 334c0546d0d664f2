"""Attention written by hand, and torch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.family import EAGER, LENGTH, PADDED, Attention, Family, hidden, layers

SDPA = ("sdpa",)


class EinsumAttention(nn.Module):
    """Causal attention in einsum, parameters without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(64, 4, 16) / 8) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 16, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bnd,dhe->bnhe", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 16**0.5
        n = x.shape[1]
        seen = torch.tril(torch.ones(n, n, dtype=torch.bool, device=x.device))
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        return torch.einsum("bqhe,hed->bqd", mixed, self.o)


class HandSoftmax(nn.Module):
    """Bidirectional attention over (batch * heads, tokens, width) with exp and sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            t.view(b, n, 4, 16).transpose(1, 2).reshape(b * 4, n, 16)
            for t in self.qkv(x).chunk(3, -1)
        )
        scores = torch.bmm(q, k.transpose(1, 2)) * 16**-0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.bmm(weights, v).view(b, 4, n, 16).transpose(1, 2).reshape(b, n, 64)
        return self.out(mixed)


class _Scores(nn.Module):
    """Half of an attention: probabilities from hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k = (f(x).view(b, n, 4, 16).transpose(1, 2) for f in (self.query, self.key))
        hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1)


class _Mix(nn.Module):
    """The other half: values mixed by given probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        v = self.value(x).view(b, n, 4, 16).transpose(1, 2)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, 64))


class Spanning(nn.Module):
    """One attention across two modules that know nothing of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.mix = _Scores(), _Mix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x, self.scores(x))


class Several(nn.Module):
    """Self attention and cross attention in one forward, all projections its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.query, self.kv = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 128)
        self.out = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attend = nn.functional.scaled_dot_product_attention
        x = x + attend(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, 64)
        q = self.query(x).view(b, n, 4, 16).transpose(1, 2)
        k, v = (
            t.view(b, memory.shape[1], 4, 16).transpose(1, 2) for t in self.kv(memory).chunk(2, -1)
        )
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, 64))


class Stack(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, *rest)
        return x


class TorchEncoder(nn.Module):
    """torch's own encoder, whose eval mode bypasses its attention module."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.encoder(x, src_key_padding_mask=padded)
        return out


class TorchDecoder(nn.Module):
    """torch's own decoder with a causal mask, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(64, 4, 96)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[0])
        out: torch.Tensor = self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)
        return out


class MultiHead(nn.Module):
    """torch's attention module, with or without the averaged weights that its caller may want."""

    def __init__(self, weights: bool, cross: bool) -> None:
        super().__init__()
        widths = {"kdim": 48, "vdim": 40} if cross else {}
        self.inner = nn.MultiheadAttention(64, 4, batch_first=True, **widths)
        self.weights = weights

    def forward(self, x: torch.Tensor, *memory: torch.Tensor) -> Any:
        key, value = memory or (x, x)
        return self.inner(x, key, value, need_weights=self.weights)


class Flex(nn.Module):
    """torch's flex attention with a causal mask function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def causal(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return torch.where(j <= i, score, -torch.inf)

        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = flex_attention(q, k, v, score_mod=causal)
        return self.out(mixed.transpose(1, 2).reshape(b, n, 64))


def _memory(width: int = 64, first: bool = True) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        x, memory = torch.randn(2, LENGTH, 64), torch.randn(2, 9, width)
        return {"x": x, "memory": memory} if first else {"x": x.mT, "memory": memory.mT}

    return inputs


def _two() -> dict[str, Any]:
    return {
        "x": torch.randn(2, LENGTH, 64),
        "key": torch.randn(2, 9, 48),
        "value": torch.randn(2, 9, 40),
    }


class _Named(nn.Module):
    """MultiHead with named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiHead(False, True)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return self.attention(x, key, value)


WRITTEN: tuple[Family, ...] = (
    Family(
        "einsum",
        lambda _: Stack(EinsumAttention),
        hidden(),
        layers("layers.{}", 0, 1, mask="causal"),
        EAGER,
    ),
    Family(
        "hand-softmax",
        lambda _: Stack(HandSoftmax),
        hidden(),
        layers("layers.{}", 0, 1, mask="full", fused=True),
        EAGER,
        silent=2,
    ),
    Family(
        "spanning-modules",
        lambda _: Stack(Spanning, 1),
        hidden(),
        layers("layers.{}", mask="causal"),
        EAGER,
    ),
    Family(
        "several-in-one",
        lambda _: Several(),
        _memory(),
        (
            Attention("", "causal", fused=True),
            Attention("", "full", fused=True, cross=True),
        ),
        SDPA,
    ),
    Family(
        "torch-encoder",
        lambda _: TorchEncoder(),
        lambda: {**hidden()(), "padded": torch.zeros(2, LENGTH, dtype=torch.bool)},
        layers("encoder.layers.{}.self_attn", 0, 1, mask=PADDED, fused=True),
        SDPA,
    ),
    Family(
        "torch-decoder",
        lambda _: TorchDecoder(),
        lambda: {"x": torch.randn(LENGTH, 2, 64), "memory": torch.randn(9, 2, 64)},
        (
            Attention("decoder.layers.0.self_attn", "causal", fused=True),
            Attention("decoder.layers.0.multihead_attn", "full", fused=True, cross=True),
        ),
        SDPA,
    ),
    Family(
        "torch-mha",
        lambda _: MultiHead(False, False),
        hidden(),
        (Attention("inner", "full", fused=True),),
        SDPA,
    ),
    Family(
        "torch-mha-weights",
        lambda _: MultiHead(True, False),
        hidden(),
        (Attention("inner", "full", fused=True),),
        EAGER,
    ),
    Family(
        "torch-mha-cross",
        lambda _: _Named(),
        _two,
        (Attention("attention.inner", "full", cross=True),),
        SDPA,
    ),
    Family(
        "flex",
        lambda _: Flex(),
        hidden(),
        (Attention("", "causal", fused=True),),
        ("flex",),
    ),
)
