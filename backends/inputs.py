"""The tensors of a kernel call, as one value per spec.

Every generated backend offers the same raw functions, without autograd, in its modules
`recurrence`, `block_sparse` and `decode`:

    recurrence.forward(spec, x)                          -> (out, end state)
    recurrence.backward(spec, x, grad_out, grad_end)     -> RecurrenceGrads
    block_sparse.forward(spec, x)                        -> (out, lse)
    block_sparse.backward(spec, x, out, lse, grad_out)   -> BlockSparseGrads
    decode.forward(spec, x)                              -> (out, lse)

Shapes and meanings are those of the specs. `out` has the dtype of `v`; states, log-sum-exps and
the gradients of float32 inputs are float32. Inputs may have any strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class RecurrenceInputs:
    """Inputs of a `Recurrence` without padding, which the caller has folded into them.

    `start` is the state before the first token, (B, Hkv, Dk, state_width) float32, None for zero;
    with `cu_seqlens` it is (S, Hkv, Dk, state_width), one per sequence, and so is the end state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    add: Tensor | None = None
    bonus: Tensor | None = None
    cu_seqlens: Tensor | None = None
    start: Tensor | None = None


class RecurrenceGrads(NamedTuple):
    """Gradients of the inputs that were given, None for the others."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None
    erase: Tensor | None = None
    add: Tensor | None = None
    bonus: Tensor | None = None
    start: Tensor | None = None


@dataclass(frozen=True)
class BlockSparseInputs:
    """Inputs of a `BlockSparse` call."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None
    temperature: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    blocks: Tensor | None = None


class BlockSparseGrads(NamedTuple):
    """Gradients of the inputs that were given, None for the others."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True)
class DecodeInputs:
    """Inputs of a `Decode` call."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None = None
    pages: Tensor | None = None
    index: Tensor | None = None
    sinks: Tensor | None = None
