"""lowrank_mlp: every projection as a product of two thin matrices, W ~ L R.

Of all rank-r matrices the one with the smallest error on what the projection really reads is asked
for: min E |W x - L R x|^2. With E[x x^T] = C C^T this is the truncated SVD of W C, whose left
singular vectors U_r give L R = U_r U_r^T W (LoRAP's activation-weighted SVD, with the full second
moment in place of its diagonal).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from rewriter.mixers.channel.base import (
    ChannelInfo,
    ChannelMixer,
    ChannelOptions,
    Dense,
    Sizes,
    Structure,
)


class LowRankOptions(ChannelOptions):
    """Options of lowrank_mlp.

    Attributes:
        energy: if given, the smallest rank that keeps this share of E |W x|^2, instead of `ratio`.
        weighting: which second moment of the inputs decides: all of it, its diagonal, or none.
    """

    energy: float | None = Field(default=None, gt=0.0, le=1.0)
    weighting: Literal["full", "diagonal", "none"] = "full"


class LowRank(Structure):
    """x R^T L^T with R (rank, input) and L (output, rank)."""

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        self.left = nn.Parameter(torch.zeros(outputs, rank))
        self.right = nn.Parameter(torch.zeros(rank, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def dense(self) -> torch.Tensor:
        return self.left @ self.right

    def fit(self, dense: Dense) -> None:
        """The optimum in closed form; singular values are shared evenly by both factors."""
        rank = self.right.shape[0]
        values, vectors = spectrum(dense)
        left = vectors[:, :rank]
        right = left.mT @ dense.weight.double()
        share = values[: left.shape[1]].clamp_min(1e-30).pow(0.25)
        with torch.no_grad():
            self.left.zero_()[:, : left.shape[1]] = left * share
            self.right.zero_()[: left.shape[1]] = right / share[:, None]


class LowRankMlp(ChannelMixer):
    info = ChannelInfo(
        name="lowrank_mlp",
        tier="distilled",
        summary="projections as products of two thin matrices, fitted to the activations",
        maths="W ~ U_r U_r^T W, U_r the left singular vectors of W C, E[x x^T] = C C^T",
        source="LoRAP (arXiv 2404.09695); catalogue: svd_lowrank",
    )
    Options = LowRankOptions

    @classmethod
    def prepare(cls, options: ChannelOptions, dense: Dense) -> Dense:
        assert isinstance(options, LowRankOptions)
        if dense.moment is None or options.weighting == "none":
            return Dense(dense.weight)
        if options.weighting == "full":
            return dense
        return Dense(dense.weight, torch.diag(dense.moment.diagonal()))

    @classmethod
    def sizes(cls, options: ChannelOptions, dense: Dense) -> Sizes:
        assert isinstance(options, LowRankOptions)
        outputs, inputs = dense.weight.shape
        if options.energy is None:
            rank = int(options.ratio * outputs * inputs / (outputs + inputs))
        else:
            values, _ = spectrum(dense)
            kept = values.cumsum(0) / values.sum().clamp_min(1e-30)
            rank = int((kept < options.energy * (1.0 - 1e-12)).sum()) + 1
        return {"rank": max(1, min(rank, outputs, inputs))}

    @classmethod
    def structure(cls, outputs: int, inputs: int, sizes: Mapping[str, int]) -> Structure:
        return LowRank(outputs, inputs, sizes["rank"])

    @classmethod
    def full(cls, outputs: int, inputs: int) -> Sizes:
        return {"rank": min(outputs, inputs)}


def spectrum(dense: Dense) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values of W C, largest first, and left singular vectors, in fp64.

    They are the eigenpairs of W E[x x^T] W^T, so no factor C is needed.
    """
    weight = dense.weight.double()
    values, vectors = torch.linalg.eigh(weight @ dense.damped() @ weight.mT)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)
