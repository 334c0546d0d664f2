"""Changing what one module computes: it becomes an instance of a subclass of its own class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, cast

from torch import nn


class InPlace(nn.Module):
    """Base of the mixins that `become` puts in front of a module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__, self.__dict__


def become(module: nn.Module, mixin: type[InPlace]) -> None:
    """Put `mixin` in front of the module's class, in place; everything else stays as it is."""
    module.__class__ = _subclass(cast("Hashable", mixin), cast("Hashable", type(module)))


@lru_cache(maxsize=1024)
def _subclass(mixin: Hashable, base: Hashable) -> type[nn.Module]:
    """Name, module, docstring and the signature of `forward` are those of `base`."""
    front, own = cast("type[InPlace]", mixin), cast("type[nn.Module]", base)
    names: dict[str, Any] = {
        key: getattr(own, key) for key in ("__module__", "__qualname__", "__doc__")
    }
    run: Callable[..., Any] = front.forward

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    names["forward"] = forward
    return type(own.__name__, (front, own), names)


def _rebuild(mixin: type[InPlace], base: type[nn.Module]) -> nn.Module:
    cls = _subclass(cast("Hashable", mixin), cast("Hashable", base))
    return cls.__new__(cls)
