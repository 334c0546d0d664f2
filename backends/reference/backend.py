"""The reference backend: every spec, any device and dtype, differentiable, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rewriter.backends.reference.block_sparse import block_sparse
from rewriter.backends.reference.decode import decode
from rewriter.backends.reference.joint import joint_window_linear
from rewriter.backends.reference.long_conv import long_conv
from rewriter.backends.reference.recurrence.kernel import recurrence
from rewriter.backends.reference.window import window_attention
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.long_conv import LongConv
from rewriter.ir.recurrence import Recurrence

if TYPE_CHECKING:
    from rewriter.backends.registry import Query


class ReferenceBackend:
    """Total: declines nothing. It is also the oracle that other backends are tested against."""

    name = "reference"
    priority = 0

    def decline(self, query: Query) -> str | None:
        return None

    def kernel(self, query: Query) -> Callable[..., Any]:
        spec = query.spec
        if isinstance(spec, WindowAttention):
            return partial(window_attention, spec)
        if isinstance(spec, Recurrence):
            return partial(recurrence, spec)
        if isinstance(spec, BlockSparse):
            return partial(block_sparse, spec)
        if isinstance(spec, Decode):
            return partial(decode, spec)
        if isinstance(spec, LongConv):
            return partial(long_conv, spec)
        return partial(joint_window_linear, spec)
