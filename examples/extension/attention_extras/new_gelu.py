"""A graph pattern: GELU's tanh form, written out by hand in many models, as the one operator.

Eight pointwise operators become one; a compiler behind would fuse them, plain execution does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.extension import GraphPattern


class NewGelu(GraphPattern):
    """Found with its numbers as they are; a GELU with others is another function."""

    name = "new_gelu"

    def examples(self) -> tuple[torch.Tensor, ...]:
        return (torch.linspace(-6.0, 6.0, 48).reshape(2, 24),)

    def pattern(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))

    def replacement(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    def check(self, x: fx.Node) -> str | None:
        dtype = x.meta["val"].dtype
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            return None
        return f"'{x.name}' is of {dtype}, which was not compared"
