"""Gradients through the reference, for what a generated backend cannot differentiate.

An operator runs below autograd, where nothing is recorded; `torch.func.vjp` brings its own tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.backends.inputs import BlockSparseInputs, RecurrenceInputs

Inputs = TypeVar("Inputs", RecurrenceInputs, BlockSparseInputs)


def gradients_of(
    run: Callable[[Inputs], Sequence[Tensor]], x: Inputs, grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """Run `run` again with gradients and pull `grads` back to the given floating inputs.

    Args:
        run: plain differentiable torch.
        x: its inputs.
        grads: one gradient per output, None for an output that has none.

    Returns:
        One contiguous tensor per floating input that is not None, in field order.
    """
    given = {f.name: getattr(x, f.name) for f in fields(x)}
    names = [n for n, t in given.items() if t is not None and t.is_floating_point()]
    wanted = [i for i, grad in enumerate(grads) if grad is not None]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        every = run(replace(x, **dict(zip(names, tensors, strict=True))))
        return tuple(every[i] for i in wanted)

    primals = tuple(given[n].detach() for n in names)
    pulled: tuple[Any, ...] = torch.func.vjp(outputs, *primals)
    values, pull = pulled
    cotangents = tuple(
        grad.to(value.dtype)
        for grad, value in zip((g for g in grads if g is not None), values, strict=True)
    )
    return [g.contiguous() for g in pull(cotangents)]
