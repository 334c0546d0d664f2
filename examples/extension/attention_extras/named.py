"""A transparent rule: an operator that gives a tensor a name and changes nothing.

Programs name activations so that a profiler or a checkpointing policy finds them. The operator is
opaque to every graph matcher, so naming the scores of an attention would hide it.
"""

from __future__ import annotations

from typing import Any

import torch

from rewriter.extension import Transparent


@torch.library.custom_op("attention_extras::named", mutates_args=())
def named(x: torch.Tensor, name: str) -> torch.Tensor:
    """x itself, as a new tensor."""
    return x.clone()


@named.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad, None


named.register_autograd(_backward)
NAMED = Transparent("attention_extras::named")
