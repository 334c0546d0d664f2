"""FlexAttention, traced as the operations that it stands for.

`flex_attention` takes functions of one score and its indices. Tracers keep these apart as graphs of
scalars, or do not get through at all (block masks look at values, gradients are not there on CPUs).
While a module is captured the operator is therefore written out as its own reference does it
(torch/_higher_order_ops/flex_attention.py: scores in float32, `where` with minus infinity, safe
softmax), with indices of shapes (B, 1, 1, 1), (1, H, 1, 1), (1, 1, N, 1) and (1, 1, 1, M): a
function of scalars then computes all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rewriter.passes import torch_private

_MAKES = ("new_ones", "new_zeros", "new_full", "new_tensor", "new_empty")


@contextmanager
def written_out() -> Iterator[None]:
    """Inside it calls of `flex_attention`, compiled or not, run as plain operations."""
    with torch_private.flex_attention_as(_attend):
        yield


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    options: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator on (B, H, N, D) queries, (B, Hkv, M, D) keys and (B, Hkv, M, E) values.

    Returns:
        (B, H, N, E) outputs, and (B, H, N) log-sum-exp and maximum of the scores in base 2, which
        are empty unless the options ask for them.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(precise) @ key.to(precise).transpose(-2, -1)) * scale
    indices = [
        torch.arange(size, device=scores.device).view(*(-1 if d == dim else 1 for d in range(4)))
        for dim, size in enumerate(scores.shape)
    ]
    with _AllAtOnce([scores, *indices]):
        changed = score_mod(scores, *indices)
    if not torch_private.hides_nothing(block_mask[-1]):
        with _AllAtOnce(indices):
            seen = block_mask[-1](*indices)
        changed = torch.where(seen, changed, -math.inf)
    weights = torch.ops.aten._safe_softmax(changed, -1)
    mixed = weights.to(query.dtype) @ value
    empty = scores.new_empty(0)
    sums = torch.logsumexp(changed, -1) / math.log(2) if options["OUTPUT_LOGSUMEXP"] else empty
    largest = changed.amax(-1) / math.log(2) if options["OUTPUT_MAX"] else empty
    return mixed, sums, largest


class _AllAtOnce(TorchFunctionMode):
    """A function of scalars run on four-dimensional tensors of them.

    Elementwise operations need nothing. `table[b][h][i]` is joined to `table[b, h, i]`, since its
    first index alone would give all rows. Anything else that mixes the scalars with one another
    (a sum of a row, say) cannot be told from one that does not, and is refused.

    Raises:
        NotImplementedError: an operation gives something that is no tensor of one number for each
            score.
    """

    def __init__(self, scalars: list[torch.Tensor]) -> None:
        super().__init__()
        self._scalars = {id(t): t for t in scalars}
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__getitem__" and (id(args[0]) in self._rows or self._any(args[1])):
            return self._pick(*args)
        if any(id(x) in self._rows for x in (*args, *kwargs.values())):
            raise NotImplementedError(f"'{name}' uses rows of a table in a function of scores")
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and self._any((*args, *kwargs.values())):
            if name in _MAKES and out.dim() == 0:
                return out
            if out.dim() != 4:
                raise NotImplementedError(f"'{name}' in a function of scores is not elementwise")
            self._scalars[id(out)] = out
        return out

    def _any(self, values: Any) -> bool:
        found = values if isinstance(values, tuple | list) else (values,)
        return any(
            self._any(x) if isinstance(x, tuple | list) else id(x) in self._scalars for x in found
        )

    def _pick(self, table: torch.Tensor, index: Any) -> torch.Tensor:
        given = index if isinstance(index, tuple) else (index,)
        if id(table) in self._scalars:
            raise NotImplementedError("a function of scores indexes a score")
        if id(table) in self._rows:
            _, table, before = self._rows[id(table)]
            given = (*before, *given)
        if any(not isinstance(i, int | torch.SymInt | torch.Tensor) for i in given):
            raise NotImplementedError("a function of scores slices a table")
        out = table[given]
        if len(given) == table.dim():
            self._scalars[id(out)] = out
        else:
            self._rows[id(out)] = (out, table, given)
        return out
