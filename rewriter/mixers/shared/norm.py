"""What stands in the place of softmax's normaliser: the size of an output, per head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.ir.site import AttentionSite

Norm = Literal["rms", "group", "none"]


class HeadNorm(nn.Module):
    """Root-mean-square ('rms') or centred ('group') norm over the channels of a head, times a gain.

    'none' is the gain alone. A padded token's 0 stays 0.
    """

    def __init__(self, site: AttentionSite, kind: Norm = "rms", eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(site.heads.query, site.heads.value_dim))

    def forward(self, out: Tensor) -> Tensor:
        """(B, H, n, Dv) of any floating dtype to float32."""
        x = out.float()
        if self.kind == "group":
            x = x - x.mean(-1, keepdim=True)
        if self.kind != "none":
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.weight.float()[:, None]

    def fit(self, out: Tensor, target: Tensor) -> None:
        """Multiply the gain of each head so that `out` is nearest to `target`, both (B, H, n, Dv).

        `out` is what the whole core gives now; least squares, so the error cannot grow.
        """
        mine, wanted = out.double(), target.double()
        size = mine.square().sum((0, 2, 3)).clamp_min(1e-30)
        factor = (mine * wanted).sum((0, 2, 3)) / size
        with torch.no_grad():
            self.weight.mul_(factor[:, None].to(self.weight))
