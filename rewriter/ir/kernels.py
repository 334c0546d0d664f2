"""Kernel specs: what a mixer computes, stated without saying how. Backends turn them into code.

The core contract of every kernel here: it is one function with many schedules. It consumes `n` new
tokens and an optional state and returns the outputs for these tokens and the state after them, so
that a full forward, a chunked prefill and a token step are the same call with different `n`
(design contract 3). Without a state the sequence starts here and no state is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.long_conv import LongConv
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import BATCH, KEY_DIM, KV_HEADS, VALUE_DIM, StateSpec, StateTensor


@dataclass(frozen=True)
class WindowAttention:
    """Softmax over a window and sink tokens.

    Causal: query i sees valid keys j <= i with i - j < window, or among the first `sinks` valid
    keys of its row. Bidirectional: |i - j| < window, or among the first `sinks` valid keys.
    `limit`, when given, is an outer window that also hides sinks (i - j < limit, or
    |i - j| < limit): the window the original model already had. `hidden` switches parts off for
    branch ablation, 'window' or 'sinks'; the state keeps its shape.

    `mean`, causal and without softcap, limit or hidden parts: all valid keys j <= i - window that
    are no sinks, if there are any, together are one more key and value, their means, whose score
    gains the logarithm of their number. That is what softmax gives if each of them is replaced by
    the mean.
    """

    window: int
    sinks: int
    causal: bool
    scale: float
    softcap: float | None = None
    limit: int | None = None
    hidden: frozenset[str] = frozenset()
    mean: bool = False

    def __post_init__(self) -> None:
        plain = self.causal and self.softcap is None and self.limit is None and not self.hidden
        if self.mean and not plain:
            raise ValueError("the mean of the rest goes with a plain causal window alone")


@dataclass(frozen=True)
class JointWindowLinear:
    """Sinks and window in softmax, every older key in the linear branch, one joint normaliser.

    With m_i the largest near logit, S/z the state of keys j <= i - window that are not sinks:
    o_i = (sum_near exp(s_ij - m_i) v_j + r_h f(q_i) S) / (sum_near exp(s_ij - m_i) + r_h f(q_i) z),
    r_h > 0 a ratio per head (catalogue: lolcats_hybrid, JOINT unscaled, with sinks added).
    `features` is the width of f; `hidden` switches parts off for branch ablation, 'window' (with
    its sinks) or 'linear'; the state keeps its shape. With `factors` f is the outer product of
    parts of these widths, whose product `features` is; callers hand in the parts side by side.
    """

    window: int
    sinks: int
    scale: float
    features: int
    softcap: float | None = None
    hidden: frozenset[str] = frozenset()
    factors: tuple[int, ...] = ()


KernelSpec = WindowAttention | Recurrence | JointWindowLinear | BlockSparse | Decode | LongConv


def state_of(spec: KernelSpec) -> StateSpec:
    """The state that every backend reads and writes for a causal spec.

    Near keys: `sink_k/v` with their absolute positions `sink_at` (-1 is an empty slot), the last
    window - 1 keys `ring_k/v` in order of age with `ring_valid`, and the number of tokens `seen`.
    With a mean: `rest_k/v`, float32 sums of the keys and values behind it, and `rest` their number.
    Far keys: `far`, float32 sums of f(k) [v, 1]^T; its last column is the normaliser.
    `BlockSparse` and `Decode` carry none: their keys are handed in.
    """
    if isinstance(spec, BlockSparse | Decode):
        return StateSpec(())
    if isinstance(spec, Recurrence | LongConv):
        return spec.state_spec()
    slots, ring = spec.sinks, spec.window - 1
    near = (
        StateTensor("sink_k", (BATCH, KV_HEADS, slots, KEY_DIM)),
        StateTensor("sink_v", (BATCH, KV_HEADS, slots, VALUE_DIM)),
        StateTensor("sink_at", (BATCH, slots), "int64", -1),
        StateTensor("ring_k", (BATCH, KV_HEADS, ring, KEY_DIM)),
        StateTensor("ring_v", (BATCH, KV_HEADS, ring, VALUE_DIM)),
        StateTensor("ring_valid", (BATCH, ring), "bool"),
        StateTensor("seen", (BATCH,), "int64"),
    )
    if isinstance(spec, WindowAttention):
        rest = (
            StateTensor("rest_k", (BATCH, KV_HEADS, KEY_DIM), "float32"),
            StateTensor("rest_v", (BATCH, KV_HEADS, VALUE_DIM), "float32"),
            StateTensor("rest", (BATCH,), "int64"),
        )
        return StateSpec((*near, *rest) if spec.mean else near)
    far = StateTensor("far", (BATCH, KV_HEADS, spec.features, VALUE_DIM + 1), "float32")
    return StateSpec((*near, far))
