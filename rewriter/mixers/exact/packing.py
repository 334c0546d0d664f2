"""Packed rows: sequences of different lengths end to end in one row, without padding between them.

A module that packs its input says so here for the time of the call; the attention inside it reads
it. A core that cannot serve a packed row says so, and the module runs as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ENDS: ContextVar[torch.Tensor | None] = ContextVar("packed", default=None)


class CannotPackError(Exception):
    """A core cannot serve a packed row; caught by the module that packed it."""


@contextmanager
def packed(cu_seqlens: torch.Tensor) -> Iterator[None]:
    """Attention inside runs on one row of sequences that end at `cu_seqlens` (S + 1,) int32."""
    token = _ENDS.set(cu_seqlens)
    try:
        yield
    finally:
        _ENDS.reset(token)


def ends() -> torch.Tensor | None:
    """The boundaries of the packed row that is being run, or None outside one."""
    return _ENDS.get()
