"""Which raw kernels an operator runs: the backend it was told, or the reference where none fits.

`raw(backend, family)` is the module of `backends/inputs.py`'s interface, or None for the reference,
whose functions are plain differentiable torch.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Literal

Family = Literal["recurrence", "block_sparse", "decode"]
GENERATED = ("cpu", "triton")
VARIABLE = "ATTENTION_REWRITER_BACKENDS"


def switched_on(name: str, only: str | None) -> bool:
    """Whether a backend is among `only`, the value of $ATTENTION_REWRITER_BACKENDS."""
    return only is None or name in {word.strip() for word in only.split(",")}


@lru_cache(maxsize=16)
def raw(backend: str, family: Family) -> Any | None:
    """The module with a backend's raw kernels of a family.

    Raises:
        ValueError: no such backend.
    """
    if backend == "reference":
        return None
    if backend not in GENERATED:
        raise ValueError(
            f"unknown kernel backend '{backend}'; use one of {(*GENERATED, 'reference')}"
        )
    return importlib.import_module(f"rewriter.backends.{backend}.{family}")
