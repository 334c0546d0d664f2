"""One module of the student on the input of its original: its loss, and the gradients of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rewriter.distill.attention import attention_losses
from rewriter.distill.config import LayerStage
from rewriter.distill.losses import output_error
from rewriter.distill.originals import hidden_states, tokens_of
from rewriter.mixers.base import Mixer
from rewriter.mixers.tokens import Tokens


class _EnoughSignal(Exception):  # noqa: N818 - control flow, not a failure
    """The mixers' tokens are known, and no output is wanted."""


def imitate(
    owner: nn.Module,
    cores: Sequence[Mixer],
    options: LayerStage,
    args: Any,
    kwargs: dict[str, Any],
    target: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> float:
    """Run a module of the student, and backward; its loss.

    Args:
        owner: the module; `scale` times the gradients are added to those of its parameters.
        cores: mixers in it that learn from attention weights.
        args, kwargs: what the original was called with.
        target: (B, N, ...) what the original returned.
        mask: (B, N), zero at padding.
    """
    given = dict[Mixer, Tokens]()

    def keep(core: Mixer, args: Any, kwargs: dict[str, Any]) -> None:
        given[core] = tokens_of(core, args, kwargs)
        if options.output == 0 and len(given) == len(cores):
            raise _EnoughSignal

    handles = [core.register_forward_pre_hook(keep, with_kwargs=True) for core in cores]
    value = 0.0
    try:
        with torch.set_grad_enabled(options.output > 0):
            out = hidden_states(owner(*args, **kwargs))
        if options.output > 0:
            loss = options.output * output_error(out, target, mask)
            torch.autograd.backward(loss * scale)
            value += loss.item()
        del out
    except _EnoughSignal:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for core, x in given.items():
        assert options.attention is not None
        weight = options.attention_weight / len(given)
        for share in attention_losses(
            core, x, options.attention, options.attention_rows, options.attention_queries
        ):
            torch.autograd.backward(share * (weight * scale))
            value += weight * share.item()
    return value
