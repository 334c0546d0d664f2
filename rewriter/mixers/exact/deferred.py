"""A tensor that is computed when somebody first reads it.

Models with eager attention hand the attention weights on whether or not anybody keeps them. A core
that never forms them returns such a tensor instead: whoever drops it pays nothing, whoever looks at
it (a hook, a collector of outputs, any torch operation) gets the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Answered without the values.
_FACTS = frozenset(
    {
        *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point),
        *(torch.Tensor.ndimension, torch.Tensor.__len__),
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,  # type: ignore[attr-defined]
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    }
)


class DeferredTensor(torch.Tensor):
    """A tensor of known shape and dtype whose values are computed at their first use.

    It has no gradient. Its `values()` are an ordinary tensor, which any operation works on.
    """

    _compute: Callable[[], torch.Tensor] | None
    _values: torch.Tensor | None
    _sources: tuple[tuple[torch.Tensor, int], ...]

    @staticmethod
    def of(
        compute: Callable[[], torch.Tensor],
        shape: Sequence[int],
        like: torch.Tensor,
        sources: Sequence[torch.Tensor],
    ) -> DeferredTensor:
        """Args:
        compute: gives the values, of this shape and the dtype of `like`.
        sources: tensors that `compute` reads and that may not change until then.
        """
        made: DeferredTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            DeferredTensor, tuple(shape), dtype=like.dtype, device=like.device
        )
        made._compute, made._values = compute, None
        made._sources = tuple((x, x._version) for x in sources if not x.is_inference())
        return made

    def values(self) -> torch.Tensor:  # type: ignore[override]
        """The values as an ordinary tensor.

        Raises:
            RuntimeError: a tensor they are computed from was changed in place since.
        """
        state = self.__dict__
        if state["_values"] is None:
            if any(x._version != version for x, version in state["_sources"]):
                raise RuntimeError(
                    "attention weights were read after the tensors they are computed from had been "
                    "changed in place; read them before that, or use the policy 'keep'"
                )
            with torch.no_grad():
                state["_values"] = state["_compute"]()
            state["_compute"], state["_sources"] = None, ()
        found: torch.Tensor = state["_values"]
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = pytree.tree_map(_read, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_read, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _read(x: Any) -> Any:
    return DeferredTensor.values(x) if isinstance(x, DeferredTensor) else x
