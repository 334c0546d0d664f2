"""Branches on whether values are finite, taken as if they were: to read a graph, not to run it.

Models of half precision ask `if not torch.isfinite(x).all()` before they clamp. No tracer can
decide that, and what follows is the same model either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ASKS = {"isfinite": True, "isinf": False, "isnan": False}
_JOINS = frozenset({"all", "any"})


class FiniteValues(TorchFunctionMode):
    """`bool(isfinite(x).all())` is true, `bool(isinf(x).any())` and `isnan` are false.

    Only these direct chains are answered; a branch on anything else stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, bool]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        held = self._known.get(id(first))
        if held is not None and name == "__bool__":
            return held[1]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            if name in _ASKS:
                self._known[id(out)] = (out, _ASKS[name])
            elif name in _JOINS and held is not None and held[1] == (name == "all"):
                self._known[id(out)] = (out, held[1])
        return out
