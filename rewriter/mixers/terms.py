"""From the run-time mask and bias tensors of a site to `valid` and `bias`.

What a mask means was proved at match time; at run time the tensor adds only which tokens are
padding. That it still means the same is checked on every call with new tensors, since dropping a
mask silently would be a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewriter.ir.site import AttentionSite


@dataclass(frozen=True)
class SplitTerms:
    """`valid`: (B, n) bool or None; `bias`: (1|B, 1|H, 1|n, seen + n) or None."""

    valid: torch.Tensor | None
    bias: torch.Tensor | None


def split(
    site: AttentionSite, terms: Sequence[torch.Tensor | None], seen: int, new: int
) -> SplitTerms:
    raise NotImplementedError
