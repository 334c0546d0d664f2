"""Branches on values that change no result, taken one way: to read a graph, not to run it.

Models of half precision ask `if not torch.isfinite(x).all()` before they clamp. Others ask whether
a padding mask hides anything (`mask.sum() == mask.numel()`) and leave it out if not. No tracer can
decide that, and what follows is the same model either way: values are taken as finite, and masks
as hiding something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rewriter.passes.torch_private import symbolic_expression

_ASKS = {"isfinite": True, "isinf": False, "isnan": False}
_JOINS = frozenset({"all", "any"})


class FiniteValues(TorchFunctionMode):
    """`bool(isfinite(x).all())` is true, `bool(isinf(x).any())` and `isnan` are false, and so is
    `bool(x.sum() == x.numel())` of booleans and integers.

    Only these direct chains are answered; a branch on anything else stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, bool]] = {}
        self._counts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

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
            elif name == "sum" and _whole(args, kwargs):
                self._counts[id(out)] = (out, args[0])
            elif name in ("eq", "__eq__") and self._is_size(*args):
                self._known[id(out)] = (out, False)
            elif name in _JOINS and held is not None and held[1] == (name == "all"):
                self._known[id(out)] = (out, held[1])
        return out

    def _is_size(self, count: Any, other: Any) -> bool:
        """Whether `count` is the sum of a tensor and `other` the number of its elements."""
        held = self._counts.get(id(count))
        if held is None or not isinstance(other, int | torch.SymInt):
            return False
        size = held[1].numel()
        return bool(symbolic_expression(size) == symbolic_expression(other))


def _whole(args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a sum is one of all elements, of a tensor that counts."""
    return len(args) == 1 and not kwargs and not args[0].is_floating_point()
