"""Documents and groups read off a mask tensor: what only the call knows, told by what it hides.

A mask with such an atom is static part, padding and one partition of each row's tokens. The
partition is found from the tensor, and the tensor is compared with what the three together allow,
pair by pair, so a tensor that means anything else is never mistaken for one.
"""

from __future__ import annotations

import torch

from rewriter.ir.mask import CausalOrGroup, Documents, Mask

_ROUNDS = 40
"""Pointer jumping halves the way to a document's first token each time."""


def labels_of(mask: Mask, allow: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    """The partition that a mask tensor shows.

    Args:
        mask: with `Documents` or `CausalOrGroup`.
        allow: (B, N, N) bool, queries and keys the same tokens from position 0 on.
        real: (B, N) bool; other tokens are padding, seen by nobody.

    Returns:
        (B, N) int64, equal for tokens of one document or group: the position of its first
        (documents) or last token (groups). None if the tensor does not mean this mask.
    """
    n = allow.shape[-1]
    steps = torch.arange(n, device=allow.device)
    grouped = any(isinstance(a, CausalOrGroup) for a in mask.atoms)
    if grouped:
        far = n - 1 - allow.flip(-1).int().argmax(-1)
        labels = torch.where(allow.any(-1), far, steps).maximum(steps)
    else:
        first = torch.where(allow.any(-1), allow.int().argmax(-1), steps)
        labels = _ends(first.minimum(steps))
    same = labels[:, :, None] == labels[:, None, :]
    shown = mask.dense(steps, steps)
    shown = shown | same if grouped else shown & same
    shown = shown & real[:, None, :]
    # Queries that are padding may see anything: nobody reads what they give.
    wrong = (shown != allow) & real[:, :, None]
    return None if bool(wrong.any()) else torch.where(real, labels, steps)


def _ends(back: torch.Tensor) -> torch.Tensor:
    """Follow (B, N) links to earlier positions until nothing moves."""
    for _ in range(_ROUNDS):
        further = back.gather(-1, back)
        if torch.equal(further, back):
            break
        back = further
    return back


def has_labels(mask: Mask) -> bool:
    """Whether a mask has an atom whose partition `labels_of` reads."""
    return any(isinstance(a, Documents | CausalOrGroup) for a in mask.atoms)


def boundaries(labels: torch.Tensor) -> torch.Tensor | None:
    """(S + 1,) int32 ends of the documents of one row, (N,) labels; None if one is not contiguous.

    Tokens between two of a document that carry labels of their own count as documents too.
    """
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1]
    at = starts.nonzero()[:, 0]
    if len(set(labels[at].tolist())) != at.numel():
        return None
    end = torch.tensor([labels.numel()], device=labels.device)
    return torch.cat((at, end)).int()
