"""monarch_mlp: every projection as block-diagonal x permutation x block-diagonal.

The input is cut into `inner` blocks of p channels, the output is interleaved into `outer` groups
of s channels. Between block k and group l stands an s x p slice of W, kept with rank b:

    W[s' outer + l, k p + p'] ~ sum_b L[l, s', k b + b'] R[k, b' outer + l, p']

The best such matrix has the rank-b SVD of every slice (Monarch projection). Parameters and
multiplications: b (inputs outer + outputs inner) instead of inputs outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


class MonarchOptions(ChannelOptions):
    """Options of monarch_mlp.

    Attributes:
        blocks: blocks on either side; the divisor nearest to the root of the width by default.
        weighting: scale the columns by the root mean square of what they read before the SVD.
    """

    blocks: int | None = Field(default=None, ge=1)
    weighting: bool = True


class Monarch(Structure):
    """Two block-diagonal matrices with a transposition between them.

    right is (inner, rank * outer, p), left is (outer, s, inner * rank).
    """

    def __init__(self, outputs: int, inputs: int, inner: int, outer: int, rank: int):
        super().__init__()
        if inputs % inner or outputs % outer:
            raise ValueError(
                f"{inputs} x {outputs} channels do not divide into {inner} x {outer} blocks"
            )
        self.inner, self.outer, self.rank = inner, outer, rank
        self.right = nn.Parameter(torch.zeros(inner, rank * outer, inputs // inner))
        self.left = nn.Parameter(torch.zeros(outer, outputs // outer, inner * rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lead = x.shape[:-1]
        blocks = x.reshape(-1, self.inner, x.shape[-1] // self.inner).transpose(0, 1)
        h = torch.bmm(blocks, self.right.mT.to(x.dtype))  # (inner, rows, rank * outer)
        h = h.view(self.inner, -1, self.rank, self.outer).permute(3, 1, 0, 2).flatten(2)
        y = torch.bmm(h, self.left.mT.to(x.dtype))  # (outer, rows, s)
        return y.permute(1, 2, 0).reshape(*lead, -1)

    def dense(self) -> torch.Tensor:
        """From the entry formula, not from the way the product is computed."""
        whole = torch.einsum("lskb,kblp->slkp", self._left(), self._right())
        return whole.flatten(2).flatten(0, 1)

    def fit(self, dense: Dense) -> None:
        """Rank-b SVD of every slice, singular values shared evenly by both factors."""
        weight = dense.weight.double()
        scale = dense.damped().diagonal().sqrt()  # root mean square of each input channel
        slices = (weight * scale).reshape(-1, self.outer, self.inner, weight.shape[1] // self.inner)
        u, sigma, v = torch.linalg.svd(slices.permute(1, 2, 0, 3), full_matrices=False)
        rank = min(self.rank, sigma.shape[-1])
        root = sigma[..., :rank].sqrt()
        left = u[..., :rank] * root[..., None, :]  # l, k, s, b
        right = root[..., None] * v[..., :rank, :]  # l, k, b, p
        right = right / scale.reshape(self.inner, 1, -1)
        with torch.no_grad():
            self.left.zero_(), self.right.zero_()
            self._left()[..., :rank] = left.permute(0, 2, 1, 3).to(self.left)
            self._right()[:, :rank] = right.permute(1, 2, 0, 3).to(self.right)

    def _left(self) -> torch.Tensor:
        """(outer, s, inner, rank) view."""
        return self.left.view(self.outer, -1, self.inner, self.rank)

    def _right(self) -> torch.Tensor:
        """(inner, rank, outer, p) view."""
        return self.right.view(self.inner, self.rank, self.outer, -1)


class MonarchMlp(ChannelMixer):
    info = ChannelInfo(
        name="monarch_mlp",
        tier="distilled",
        summary="projections as two block-diagonal matrices with a permutation between them",
        maths="W[s' l | k p'] ~ sum_b L[l, s', kb] R[k, bl, p'], rank-b SVD of every slice",
        source="Monarch (arXiv 2204.00595); catalogue: monarch_linear",
    )
    Options = MonarchOptions

    @classmethod
    def prepare(cls, options: ChannelOptions, dense: Dense) -> Dense:
        assert isinstance(options, MonarchOptions)
        return dense if options.weighting else Dense(dense.weight)

    @classmethod
    def sizes(cls, options: ChannelOptions, dense: Dense) -> Sizes:
        assert isinstance(options, MonarchOptions)
        outputs, inputs = dense.weight.shape
        inner = near_root(inputs) if options.blocks is None else options.blocks
        outer = near_root(outputs) if options.blocks is None else options.blocks
        rank = int(options.ratio * outputs * inputs / (inputs * outer + outputs * inner))
        most = min(inputs // inner, outputs // outer)
        return {"inner": inner, "outer": outer, "rank": max(1, min(rank, most))}

    @classmethod
    def structure(cls, outputs: int, inputs: int, sizes: Mapping[str, int]) -> Structure:
        return Monarch(outputs, inputs, sizes["inner"], sizes["outer"], sizes["rank"])

    @classmethod
    def full(cls, outputs: int, inputs: int) -> Sizes:
        inner, outer = near_root(inputs), near_root(outputs)
        return {
            "inner": inner,
            "outer": outer,
            "rank": min(inputs // inner, outputs // outer),
        }


def near_root(width: int) -> int:
    """The divisor of `width` nearest to its square root."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: abs(d - width**0.5))
