"""Changing what one module computes: it becomes an instance of a subclass of its own class."""

from __future__ import annotations

from collections.abc import Hashable
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
    """Name, module and docstring are those of `base`."""
    front, own = cast("type[InPlace]", mixin), cast("type[nn.Module]", base)
    names = {key: getattr(own, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (front, own), names)


def _rebuild(mixin: type[InPlace], base: type[nn.Module]) -> nn.Module:
    cls = _subclass(cast("Hashable", mixin), cast("Hashable", base))
    return cls.__new__(cls)
