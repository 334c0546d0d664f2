"""The causal scan: the fastest of its three forms for the length and the kind."""

from __future__ import annotations

from torch import Tensor

from rewriter.backends.reference.recurrence.chunks import scan_chunks
from rewriter.backends.reference.recurrence.corrected import scan_corrected
from rewriter.backends.reference.recurrence.flow import Flow
from rewriter.backends.reference.recurrence.tokens import scan_tokens

FEW = 4


def scan(x: Flow, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Read and write the state.

    Args:
        x: the inputs.
        start: (B, Hkv, Dk, W) state before the first token, or None for zero.

    Returns:
        (B, H, n, W) reads and the state after the last token, in the dtype of the inputs.
    """
    n = x.q.shape[2]
    if n == 0:
        return x.q.new_zeros(
            *x.q.shape[:3], x.v.shape[-1]
        ), x.zero_state() if start is None else start
    if n <= FEW:
        return scan_tokens(x, start)
    if x.beta is not None or x.erase is not None:
        return scan_corrected(x, start)
    return scan_chunks(x, start)
