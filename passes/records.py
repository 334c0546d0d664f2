"""Results that are objects of a model's own dataclass, as trees that a tracer can take apart.

Many models hand their results on as `@dataclass class Intermediates: ...`, which torch's trees hold
to be single leaves. `opened` puts a node in the place of each such object, `closed` the object
back.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Record:
    """The attributes of an object of class `kind`, by name."""

    kind: type
    names: tuple[str, ...]
    values: tuple[Any, ...]


def opened(value: Any) -> Any:
    """The same tree with the attributes of its dataclass objects as further branches."""

    def take(leaf: Any) -> Any:
        if not _is_record(leaf):
            return leaf
        fields = vars(leaf)
        return _Record(type(leaf), tuple(fields), tuple(opened(x) for x in fields.values()))

    return pytree.tree_map(take, value, is_leaf=_is_record)


def closed(value: Any) -> Any:
    """The tree that was `opened`, its objects made again without running their constructors."""

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, _Record):
            return leaf
        made: Any = object.__new__(leaf.kind)
        made.__dict__.update(zip(leaf.names, map(closed, leaf.values), strict=True))
        return made

    return pytree.tree_map(put, value, is_leaf=lambda x: isinstance(x, _Record))


def _is_record(value: Any) -> bool:
    """An object of a plain dataclass or namespace that torch's trees do not know."""
    if isinstance(value, type | torch.Tensor | _Record) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    if kind in pytree.SUPPORTED_NODES or isinstance(value, dict | list | tuple):
        return False
    return is_dataclass(value) or kind is SimpleNamespace


pytree.register_pytree_node(
    _Record,
    lambda r: (list(r.values), (r.kind, r.names)),
    lambda values, known: _Record(known[0], known[1], tuple(values)),
    serialized_type_name="rewriter.passes.records.Record",
)
