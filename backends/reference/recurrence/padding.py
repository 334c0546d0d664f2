"""Padding folded into the inputs: a padded token neither writes nor decays, and reads 0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.backends.reference.recurrence.flow import Flow


def fold_padding(x: Flow, gate: Tensor | None, valid: Tensor) -> tuple[Flow, Tensor | None]:
    """The same flow and log input gate with padding made harmless. valid (B, n) bool."""
    hidden = ~valid[:, None, :, None]

    def zero(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.masked_fill(hidden, 0.0)

    flow = replace(
        x,
        q=x.q.masked_fill(hidden, 0.0),
        k=x.k.masked_fill(hidden, 0.0),
        v=x.v.masked_fill(hidden, 0.0),
        g=zero(x.g),
        beta=zero(x.beta),
        erase=zero(x.erase),
        add=zero(x.add),
    )
    return flow, None if gate is None else gate.masked_fill(hidden[..., 0], -torch.inf)
