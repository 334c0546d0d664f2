"""Earlier tokens of a row: short convolutions and token shifts, over padding and pieces.

"One token earlier" means the last token before it that is not padding, also when that one came in
an earlier call, so neither padding nor the way a sequence is cut changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.ir.state import BATCH, StateTensor


@dataclass(frozen=True)
class Line:
    """Tokens in a row, `reach` earlier ones first.

    Attributes:
        rows: (B, reach + n, C), valid tokens together at the end, hidden ones in front.
        rank: (B, n) where each new token lies in `rows`; None where nothing is hidden.
        reach: how many earlier tokens can be asked for.
    """

    rows: Tensor
    rank: Tensor | None
    reach: int

    def earlier(self, steps: int) -> Tensor:
        """(B, n, C): for every new token the one `steps` before it; 0 before the first."""
        if self.rank is None:
            return self.rows[:, self.reach - steps : self.rows.shape[1] - steps]
        at = (self.rank - steps).clamp_min(0)[..., None].expand(-1, -1, self.rows.shape[-1])
        return self.rows.gather(1, at)

    def carry(self) -> Tensor:
        """(B, reach, C): the last valid tokens, for the next call."""
        return self.rows[:, self.rows.shape[1] - self.reach :]


def line_up(x: Tensor, valid: Tensor | None, before: Tensor | None, reach: int) -> Line:
    """Put new tokens x (B, n, C) behind `before` (B, reach, C), None for a new sequence."""
    if before is None:
        before = x.new_zeros(x.shape[0], reach, x.shape[-1])
    rows = torch.cat((before.to(x.dtype), x), 1)
    if valid is None:
        return Line(rows, None, reach)
    shown = F.pad(valid, (reach, 0), value=True)
    order = shown.long().argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)[:, reach:]
    return Line(rows.gather(1, order[..., None].expand_as(rows)), rank, reach)


class ShortConv(nn.Module):
    """Causal convolution of `width` taps in every channel; starts as the identity."""

    def __init__(self, channels: int, width: int, activation: Literal["identity", "silu"]) -> None:
        super().__init__()
        self.width, self.activation = width, activation
        start = torch.zeros(channels, width)
        start[:, -1] = 1.0
        self.weight = nn.Parameter(start)

    def forward(
        self, x: Tensor, valid: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, n, C) to the same, and the carry; `before` is the carry of the call before."""
        line = line_up(x, valid, before, self.width - 1)
        out = line.earlier(0) * self.weight[:, -1]
        for steps in range(1, self.width):
            out = out + line.earlier(steps) * self.weight[:, -1 - steps]
        return F.silu(out) if self.activation == "silu" else out, line.carry()


class TokenShift(nn.Module):
    """x + mu (x_before - x), mu learned per channel for each of several readers; 0 at the start."""

    def __init__(self, channels: int, readers: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(readers, channels))

    def forward(
        self, x: Tensor, valid: Tensor | None, before: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(B, n, C) to one (B, n, C) for each reader, and the carry."""
        line = line_up(x, valid, before, 1)
        change = line.earlier(1) - x
        return tuple(x + change * mu for mu in self.mu.unbind(0)), line.carry()


def carried(name: str, reach: int, channels: sympy.Expr | int) -> StateTensor:
    """The state tensor of a carry."""
    return StateTensor(name, (BATCH, reach, channels))
