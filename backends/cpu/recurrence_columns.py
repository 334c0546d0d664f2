"""A corrected recurrence of one head on several threads: its value columns are shared out.

A column of the state, and of the values that a correction writes, depends on no other column, so
every share runs the whole sequence. What is repeated is the products of queries with keys. Without
a correction the sequence is split instead (recurrence_forward.hpp), which repeats less.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.ir.recurrence import Recurrence

NARROWEST = 32  # columns: below, the repeated products weigh more than the shared ones
SHORTEST = 256  # tokens: below, threads cost more than they save


def shares(spec: Recurrence, x: RecurrenceInputs, rows: int, threads: int) -> int:
    """How many threads share the columns of a call; 1 if it is not to be split this way.

    Args:
        rows: sequences of the call.
        threads: that may run.
    """
    single = x.q.shape[1] == x.k.shape[1] == 1 and spec.correction != "none"
    if not (single and rows < threads and x.q.shape[2] >= SHORTEST):
        return 1
    count = min(-(-threads // rows), spec.value_dim // NARROWEST)
    return count if count > 1 and spec.value_dim % (count * NARROWEST) == 0 else 1


def shared(
    spec: Recurrence, x: RecurrenceInputs, out: Tensor, count: int
) -> tuple[Recurrence, RecurrenceInputs, Tensor]:
    """Spec, inputs and outputs of the call in which every share is a head; views, but the state."""
    width = spec.value_dim // count

    def columns(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], t.shape[2], count, width).transpose(1, 2)

    def same(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(t.shape[0], count, *t.shape[2:])

    gate = x.decay
    if gate is not None:
        gate = gate.expand(count) if gate.dim() == 1 else same(gate)
    start = x.start
    if start is not None:
        heads = [
            torch.cat((part, start[..., spec.value_dim :]), -1)
            for part in torch.split(start[..., : spec.value_dim], width, -1)
        ]
        start = torch.cat(heads, 1)
    bonus = None if x.bonus is None else x.bonus.expand(count, -1).contiguous()
    inputs = replace(
        x, q=x.q.expand(-1, count, -1, -1), k=x.k.expand(-1, count, -1, -1), v=columns(x.v),
        decay=gate, beta=same(x.beta), erase=same(x.erase), add=same(x.add), bonus=bonus,
        start=start,
    )  # fmt: skip
    return replace(spec, value_dim=width), inputs, columns(out)


def joined(spec: Recurrence, end: Tensor) -> Tensor:
    """The end state of the call from those of the shares, (rows, shares, Dk, width)."""
    width = spec.value_dim // end.shape[1]
    values = end[..., :width].transpose(1, 2).flatten(2).unsqueeze(1)
    return torch.cat((values, end[:, :1, :, width:]), -1)
