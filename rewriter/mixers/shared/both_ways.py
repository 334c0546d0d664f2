"""Reading a sequence from its other end, for mixers with one recurrence a direction."""

from __future__ import annotations

from torch import Tensor

from rewriter.mixers.shared.gates import per_head, per_token
from rewriter.mixers.shared.shift import line_up
from rewriter.mixers.tokens import Tokens


def turned(x: Tokens) -> Tokens:
    """The same tokens from the other end."""
    return Tokens(
        x.q.flip(2),
        x.k.flip(2),
        x.v.flip(2),
        x.stream.flip(1),
        None if x.valid is None else x.valid.flip(1),
    )


def one_late(out: Tensor, x: Tokens) -> Tensor:
    """(B, H, n, Dv): every token gets what the last real one before it read; 0 for the first."""
    late = line_up(per_token(out), x.valid, None, 1).earlier(1)
    if x.valid is not None:
        late = late * x.valid[..., None]
    return per_head(late, out.shape[1])
