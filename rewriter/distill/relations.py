"""Relations of queries, keys and values between tokens, a student's against the teacher's.

R = softmax(X Y^T / sqrt(d)) for each of A relation heads: X and Y are the vectors of all heads side
by side, split anew into A parts of width d. The loss of a pair (X, Y) is the mean over relation
heads and tokens of KL(R_teacher || R_student). MiniLM (Wang et al. 2020) takes the attention
weights and the values, MiniLMv2 (Wang et al. 2021) queries, keys and values each with themselves.
Relations have the same shape whatever widths both models have: no projection is learned between.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewriter.distill.config import Relations
from rewriter.errors import UsageError
from rewriter.mixers.tokens import Tokens


def relation_error(student: Tokens, teacher: Tokens, options: Relations, causal: bool) -> Tensor:
    """Sum over the pairs of the mean divergence of their relations, a float32 scalar in nats.

    Rows of a few queries are held at a time, and computed again for the gradient.

    Args:
        student, teacher: the tokens of one site of both models, on the same text.
        causal: a token is related to itself and earlier ones alone. (The papers have encoders.)

    Raises:
        UsageError: the vectors do not split into so many heads.
    """
    total = torch.zeros((), device=student.q.device)
    for pair in options.of:
        count = options.heads or _side(teacher, pair[0]).shape[1]
        ours = _parts(student, pair, count, "student")
        theirs = _parts(teacher, pair, count, "teacher")
        for start in range(0, student.count, options.rows):
            stop = min(start + options.rows, student.count)
            given = (*ours, *theirs, student.valid, start, stop, causal)
            part = checkpoint(_rows_error, *given, use_reentrant=False)
            assert isinstance(part, Tensor)
            total = total + part / count
    valid = student.batch * student.count
    if student.valid is not None:
        valid = max(1, int(student.valid.sum()))
    return total / valid


def _side(x: Tokens, letter: str) -> Tensor:
    return {"q": x.q, "k": x.k, "v": x.v}[letter]


def _parts(x: Tokens, pair: str, count: int, whose: str) -> tuple[Tensor, Tensor]:
    """Both sides of a pair, (B, relation heads, n, d) each."""
    left, right = (_side(x, letter) for letter in pair)
    if pair[0] != pair[1]:  # query heads of a group share their keys
        right = right.repeat_interleave(left.shape[1] // right.shape[1], 1)
    return _split(left, pair, count, whose), _split(right, pair, count, whose)


def _split(x: Tensor, pair: str, count: int, whose: str) -> Tensor:
    wide = x.transpose(1, 2).flatten(2)
    if wide.shape[-1] % count:
        raise UsageError(
            f"The {wide.shape[-1]} channels of '{pair}' of the {whose} do not split into {count} "
            "relation heads: choose another number for 'heads' of 'relations'."
        )
    return wide.view(*wide.shape[:2], count, -1).transpose(1, 2)


def _rows_error(
    left: Tensor,
    right: Tensor,
    left_teacher: Tensor,
    right_teacher: Tensor,
    valid: Tensor | None,
    start: int,
    stop: int,
    causal: bool,
) -> Tensor:
    """Divergence of some rows, summed over rows, heads and batch."""
    seen: Tensor | None = None
    if causal:
        at = torch.arange(left.shape[2], device=left.device)
        seen = (at <= at[start:stop, None])[None, None]
        stop_key = stop
    else:
        stop_key = left.shape[2]
    if valid is not None:
        keys = valid[:, None, None, :]
        seen = keys if seen is None else seen & keys
    if seen is not None:
        seen = seen[..., :stop_key]
    ours, theirs = (
        _log_rows(a[:, :, start:stop], b[:, :, :stop_key], seen)
        for a, b in ((left, right), (left_teacher.detach(), right_teacher.detach()))
    )
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    if valid is not None:
        each = each * valid[:, None, start:stop]
    return each.sum()


def _log_rows(rows: Tensor, keys: Tensor, seen: Tensor | None) -> Tensor:
    """Logarithm of the softmax over the keys that are seen, 0 at the others and in empty rows."""
    logits = rows.float() @ keys.float().mT * rows.shape[-1] ** -0.5
    if seen is None:
        return torch.log_softmax(logits, -1)
    some = seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen & some, -torch.inf)
    return torch.log_softmax(logits, -1).masked_fill(~seen, 0.0)
