"""`torch.func.vmap` over a kernel: the mapped axis joins the batch axis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from rewriter.errors import UnsupportedError


def fold_batch(
    op: str,
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
    names: Sequence[str],
    unbatched: Collection[str],
) -> list[Any]:
    """Arguments with the mapped axis folded into axis 0.

    Args:
        op: name for messages.
        size: length of the mapped axis.
        in_dims: mapped axis of each argument, None if it is not mapped.
        args: tensors named by `names`, then plain values.
        unbatched: names of the tensors that have no batch axis.

    Raises:
        UnsupportedError: a tensor without a batch axis is mapped, or sequences are packed.
    """
    out: list[Any] = []
    for number, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(arg, Tensor):
            out.append(arg)
            continue
        name = names[number]
        if name in unbatched:
            if dim is not None or name == "cu_seqlens":
                raise UnsupportedError(
                    f"{op}: vmap cannot be used with '{name}', which has no batch axis; "
                    "call it once per mapped row"
                )
            out.append(arg)
            continue
        wide = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        out.append(wide.reshape(size * wide.shape[1], *wide.shape[2:]))
    return out
