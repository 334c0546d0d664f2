"""How many softmaxes and attention operators a model runs, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_CALLS = frozenset(
    {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
)


class _Count(TorchFunctionMode):
    """Counts outermost calls: what runs inside a counted function is not counted again."""

    calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls += getattr(func, "__name__", "") in _CALLS
        return func(*args, **(kwargs or {}))


def count_softmaxes(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> int:
    """Calls of a softmax or of an attention function in one forward pass of `model`."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _Count() as count:
            model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return count.calls
