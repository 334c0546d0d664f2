"""Encoders with a language head: how often is a hidden token guessed?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewriter.errors import InputError, UsageError
from rewriter.evaluate.measurement import Measurement, pooled
from rewriter.evaluate.scoring import evaluating


def masked_accuracy(
    model: nn.Module,
    tokenizer: Any,
    rows: torch.Tensor,
    *,
    share: float = 0.15,
    seed: int = 0,
    batch: int = 4,
) -> Measurement:
    """Share of hidden tokens that are the most likely ones at their places.

    Args:
        rows: (rows, N) int64 token rows.
        share: of the tokens of each row that are replaced by the mask token, at least one.

    Raises:
        UsageError: the model gives no logits over the vocabulary.
        InputError: the tokenizer has no mask token, or there are no rows.
    """
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise InputError("The tokenizer has no mask token, so no token can be hidden.")
    if rows.shape[0] == 0:
        raise InputError("Masked-token accuracy needs at least one row of text.")
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(share * rows.shape[1]))
    device = next(model.parameters()).device
    units: list[tuple[float, float]] = []
    with evaluating(model):
        for part in torch.split(rows, batch):
            order = torch.rand(part.shape, generator=generator).argsort(-1)
            hidden = torch.zeros_like(part, dtype=torch.bool).scatter_(1, order[:, :count], True)
            output = model(input_ids=part.masked_fill(hidden, int(mask)).to(device))
            logits = getattr(output, "logits", output)
            if not isinstance(logits, torch.Tensor) or logits.shape[:2] != part.shape:
                raise UsageError(
                    "The model gives no logits for each token: masked-token accuracy needs an "
                    "encoder with its language head (...ForMaskedLM)."
                )
            right = (logits.argmax(-1).cpu() == part) & hidden
            units += [(float(hits), float(count)) for hits in right.sum(-1)]
    return pooled("masked-token accuracy", units, tokens=rows.shape[0] * count, better="high")
