"""The Hedgehog feature map: phi(x) = [softmax(x W); softmax(-x W)], learned per head.

Both halves are softmaxes over the features, so the features are positive and bounded by 1, and no
exponent is positive. Other published forms (a raw exponential, one softmax over both halves)
differ from this one and their weights do not fit it.

`HashMap` is a product of choices between two, each by the sign of a random direction, the same for
queries and keys at the start: a soft hash, learned. Of n keys spread evenly over m = 2^bits cells a
query reads n / m, so a head that looks back at one token of a long text needs m of the order of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from rewriter.backends.reference.factored import outer
from rewriter.ir.site import AttentionSite

FLOOR = 1e-12


class HedgehogMap(nn.Module):
    """phi for each head, on inputs multiplied by a constant.

    Starts at the identity (its first columns if there are fewer features than channels), from
    which distillation moves it.
    """

    def __init__(self, heads: int, width: int, features: int, factor: float) -> None:
        """Args: heads, channels of a head, columns of W (half the features), input factor."""
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.eye(width, features).repeat(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, n, width) to (B, heads, n, 2 * features), float32, at least `FLOOR`."""
        x = (x.float() * self.factor) @ self.weight.float()
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1).clamp_min(FLOOR)


class HashMap(nn.Module):
    """phi(x) = the outer product of [p_i, 1 - p_i] over the bits i, p = sigmoid(x W + b).

    phi(q).phi(k) is the probability that all bits of q and of k agree, if each bit of each were
    drawn with its p. The features are returned as two parts whose outer product phi is (that of
    the first half of the bits, then that of the second), so that pairs of tokens need the parts
    alone.
    """

    rates: ClassVar[Mapping[str, float]] = {"weight": 2.0, "bias": 2.0}

    def __init__(self, start: torch.Tensor, factor: float) -> None:
        """Args: first value of W, (heads, width, bits), and the input factor."""
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(start.shape[0], 1, start.shape[2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, n, width) to (B, heads, n, sum of `hash_factors`), float32, not negative."""
        x = (x.float() * self.factor) @ self.weight.float() + self.bias.float()
        both = torch.stack((x, -x), -1).sigmoid()  # (B, heads, n, bits, 2)
        first = hash_halves(x.shape[-1])[0]
        return torch.cat((_cells(both[..., :first, :]), _cells(both[..., first:, :])), -1)


def _cells(choices: torch.Tensor) -> torch.Tensor:
    """(..., bits, 2) to (..., 2^bits), the outer product over the bits."""
    return outer(choices.flatten(-2), (2,) * choices.shape[-2])


def hash_halves(bits: int) -> tuple[int, int]:
    """Bits of the two parts of `HashMap`."""
    return bits - bits // 2, bits // 2


def hash_factors(bits: int) -> tuple[int, int]:
    """Widths of the two parts of `HashMap`."""
    first, second = hash_halves(bits)
    return 2**first, 2**second


def hash_pair(site: AttentionSite, bits: int, sharpness: float) -> tuple[HashMap, HashMap]:
    """Maps for queries and keys; W of a query head starts as that of its key/value head.

    Args:
        sharpness: standard deviation of W. The draw is the same for every site of one shape.
    """
    for_q, for_k = input_factors(site)
    heads = site.heads
    shape = (heads.key_value, heads.key_dim, bits)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sharpness
    return (
        HashMap(start.repeat_interleave(heads.group, 0), for_q),
        HashMap(start, for_k),
    )


def input_factors(site: AttentionSite) -> tuple[float, float]:
    """Factors for q and k whose product is the site's scale, evenly shared.

    A scale that the graph applied to q before the core is taken into account, so that q and k
    reach the map at the same size.
    """
    total = site.scale * site.prescaled
    if total <= 0.0:  # no even share exists
        return site.scale, 1.0
    root = math.sqrt(total)
    return root / site.prescaled, root


def map_pair(site: AttentionSite, features: int) -> tuple[HedgehogMap, HedgehogMap]:
    """Maps for queries (one per query head) and keys (one per key/value head)."""
    for_q, for_k = input_factors(site)
    heads = site.heads
    return (
        HedgehogMap(heads.query, heads.key_dim, features, for_q),
        HedgehogMap(heads.key_value, heads.key_dim, features, for_k),
    )
