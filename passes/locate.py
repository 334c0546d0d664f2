"""Find the modules that run a softmax without tracing: for models that cannot be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rewriter.passes.capture import cache_switched_off
from rewriter.passes.torch_private import without_encoder_fast_path

_NAMES = frozenset(
    {
        "softmax",
        "_safe_softmax",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "flex_attention",
        "exp",
    }
)


class _Watch(TorchFunctionMode):
    """Notes the innermost running module at each softmax."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self._running = running
        self.found: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _NAMES:
            self.found.append(self._running[-1])
        return func(*args, **(kwargs or {}))


def find_softmax_modules(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Run `module` once and return the paths of the modules that call a softmax, in order.

    A softmax module of its own (`nn.Softmax`) counts for the module that calls it, and so does an
    exponential, which may be part of a hand-written one. Raises whatever the module raises.
    """
    running: list[str] = [""]
    hooks = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Softmax) or not name:
            continue
        hooks.append(child.register_forward_pre_hook(_entering(running, name)))
        hooks.append(child.register_forward_hook(_leaving(running), always_call=True))
    try:
        with (
            torch.no_grad(),
            cache_switched_off(module),
            without_encoder_fast_path(),
            _Watch(running) as watch,
        ):
            module(*args, **(kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(dict.fromkeys(watch.found))


def _entering(running: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        running.append(name)

    return hook


def _leaving(running: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    return hook
