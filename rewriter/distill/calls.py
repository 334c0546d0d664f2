"""What a module was called with, as JSON and tensors, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewriter.errors import UsageError


def described(value: Any, put: Callable[[torch.Tensor], Any]) -> Any:
    """Arguments as a JSON document.

    Args:
        value: tensors, numbers, strings and None, in tuples, lists and dictionaries.
        put: keeps a tensor and returns where, as JSON. An axis that was expanded has size 1 there.

    Raises:
        UsageError: anything else is among the arguments.
    """
    if isinstance(value, torch.Tensor):
        expanded = any(s == 0 and n > 1 for n, s in zip(value.shape, value.stride(), strict=True))
        return {"tensor": put(_compact(value)), "shape": list(value.shape) if expanded else None}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, list):
        return {type(value).__name__: [described(item, put) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: described(item, put) for key, item in value.items()}}
    raise UsageError(
        f"A rewritten module is called with a {type(value).__name__}, which cannot be kept on "
        "disk: leave out 'stored' of the stage 'layers'."
    )


def restored(document: Any, get: Callable[[Any], torch.Tensor]) -> Any:
    """The inverse of `described`; `get` returns the tensor that `put` kept."""
    if not isinstance(document, dict):
        return document
    if "tensor" in document:
        tensor = get(document["tensor"])
        return tensor if document["shape"] is None else tensor.expand(document["shape"])
    if "dict" in document:
        return {key: restored(item, get) for key, item in document["dict"].items()}
    if "tuple" in document:
        return tuple(restored(item, get) for item in document["tuple"])
    return [restored(item, get) for item in document["list"]]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    index = tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for n, s in sizes)
    return tensor[index] if index else tensor
