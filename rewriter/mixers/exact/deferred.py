"""A tensor that is computed when somebody first reads it.

Models with eager attention hand the attention weights on whether or not anybody keeps them. A core
that never forms them returns such a tensor instead: whoever drops it pays nothing, whoever looks at
it (a hook, a collector of outputs, any torch operation) gets the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_T: Any = torch.Tensor
# Answered without the values.
_FACTS = frozenset(
    {
        *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.__len__, _T.is_floating_point),
        *(_T.shape.__get__, _T.ndim.__get__, _T.dtype.__get__, _T.device.__get__),
        *(_T.requires_grad.__get__, _T.is_leaf.__get__, _T.grad_fn.__get__),
    }
)


@dataclass
class _State:
    compute: Callable[[], torch.Tensor]
    sources: tuple[tuple[torch.Tensor, int], ...]
    values: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The values.

        Raises:
            RuntimeError: a tensor they are computed from was changed in place since.
        """
        if self.values is None:
            if any(x._version != version for x, version in self.sources):
                raise RuntimeError(
                    "attention weights were read after the tensors they are computed from had been "
                    "changed in place; read them before that, or use the policy 'keep'"
                )
            with torch.no_grad():
                self.values = self.compute()
            self.compute, self.sources = self._nothing, ()
        return self.values

    def _nothing(self) -> torch.Tensor:
        raise AssertionError("computed already")


_STATE = "_deferred"


class DeferredTensor(torch.Tensor):
    """A tensor of known shape and dtype whose values are computed at their first use.

    It has no gradient. Whatever is done with it is done with the values, an ordinary tensor.
    """

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
        made: DeferredTensor = _T._make_wrapper_subclass(
            DeferredTensor, tuple(shape), dtype=like.dtype, device=like.device
        )
        watched = tuple((x, x._version) for x in sources if not x.is_inference())
        made.__dict__[_STATE] = _State(compute, watched)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTS:
            plain: Any = super()
            return plain.__torch_function__(func, types, args, kwargs or {})
        args, kwargs = pytree.tree_map(_read, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map(_read, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _read(x: Any) -> Any:
    if not isinstance(x, DeferredTensor):
        return x
    state: _State = x.__dict__[_STATE]
    return state.read()
