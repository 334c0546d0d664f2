"""Gates that read the stream and start neutral: whatever a token holds, they say the same."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.ir.site import AttentionSite

SILU_ONE = 1.27846454  # silu(SILU_ONE) = 1
CONTEXT = 4096  # tokens after which a slow gate has forgotten half
TUNED = 64  # inputs of the maps of a head, for which the learning rates of a stage are meant


class TokenGate(nn.Module):
    """b + W x for every token, or b + W act(V x) with `rank` rows in V; W starts at zero.

    Computed in float32, since decays are sums over many tokens of what comes out.

    Adam moves every entry by the learning rate, so what a row gives moves with the number of its
    inputs. Where the start is a fit that this would undo, the rate of a wide map is smaller by as
    much (Tensor Programs V, arXiv 2203.03466); a gate that starts neutral has a long way to go.
    """

    def __init__(
        self,
        width: int,
        out: int,
        start: float,
        rank: int | None = None,
        inner: Literal["identity", "tanh", "sigmoid"] = "identity",
        fitted: bool = False,
    ) -> None:
        """Args: width of the stream, outputs a token, initial b, rows of V, its activation, and
        whether the core starts from a fit."""
        super().__init__()
        self.inner = inner
        self.down = None if rank is None else nn.Parameter(_cosines(rank, width))
        self.weight = nn.Parameter(torch.zeros(out, width if rank is None else rank))
        self.bias = nn.Parameter(torch.full((out,), start))
        self.rates = {"weight": min(1.0, TUNED / self.weight.shape[1])} if fitted else {}

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, n, width) to (B, n, out) float32."""
        x = hidden.float()
        if self.down is not None:
            x = x @ self.down.float().T
            x = x if self.inner == "identity" else getattr(torch, self.inner)(x)
        return F.linear(x, self.weight.float(), self.bias.float())


class OutputGate(nn.Module):
    """silu(W x + b) on every output channel; 1 at the start."""

    def __init__(self, site: AttentionSite, fitted: bool = False) -> None:
        super().__init__()
        self.heads = site.heads.query
        out = self.heads * site.heads.value_dim
        self.linear = TokenGate(site.hidden_dim, out, SILU_ONE, fitted=fitted)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, n, Dm) to (B, H, n, Dv) float32."""
        return per_head(F.silu(self.linear(hidden)), self.heads)


class SlowDecay(nn.Module):
    """g = -exp(log_rate) softplus(W x + b) for every token and state head (the Mamba gate).

    Starts at half of the state left after `CONTEXT` tokens, if `step` is given at that step size.
    """

    def __init__(self, site: AttentionSite, step: float | None = None) -> None:
        """Args: the site; `step`: softplus(b) at the start, None for rate 1."""
        super().__init__()
        heads, forgotten = site.heads.key_value, math.log(2) / CONTEXT
        step = forgotten if step is None else step
        self.step = TokenGate(site.hidden_dim, heads, math.log(math.expm1(step)))
        self.log_rate = nn.Parameter(torch.full((heads,), math.log(forgotten / step)))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, Dm) to the log decay and the step size, (B, Hkv, n) float32 each."""
        step = F.softplus(self.step(hidden)).transpose(1, 2)
        return -self.log_rate.float().exp()[:, None] * step, step


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads * D) to (B, heads, n, D)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def per_token(x: Tensor) -> Tensor:
    """(B, heads, n, D) to (B, n, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def _cosines(rows: int, width: int) -> Tensor:
    """(rows, width): orthogonal rows of length one, the same on every run."""
    at = (torch.arange(width) + 0.5) * (math.pi / width)
    return torch.cos(at * torch.arange(1, rows + 1)[:, None]) * math.sqrt(2 / width)
