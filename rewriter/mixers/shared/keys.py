"""Keys that are all kept: the state of mixers that may read any earlier token."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.ir.state import (
    BATCH,
    KEY_DIM,
    KV_HEADS,
    TOKENS,
    VALUE_DIM,
    State,
    StateSpec,
    StateTensor,
)
from rewriter.mixers.tokens import Tokens

_ROOT = 100.0  # hidden scores get minus its square; exp and sigmoid of that are 0 in every dtype


@dataclass(frozen=True)
class Keys:
    """All keys so far.

    Attributes:
        k, v: (B, Hkv, seen + n, D).
        shown: (B, seen + n) bool, False at padding; None if all are real.
        seen: how many came before the new ones.
        state: the state after them, None if none was given.
    """

    k: Tensor
    v: Tensor
    shown: Tensor | None
    seen: int
    state: State | None


def key_state(heads: sympy.Expr | int = KV_HEADS) -> StateSpec:
    """`keys`, `values` and `shown` of `heads` key/value heads, growing with the tokens."""
    return StateSpec(
        (
            StateTensor("keys", (BATCH, heads, TOKENS, KEY_DIM)),
            StateTensor("values", (BATCH, heads, TOKENS, VALUE_DIM)),
            StateTensor("shown", (BATCH, TOKENS), "bool", 1.0),
        ),
        bounded=False,
    )


def all_keys(x: Tokens) -> Keys:
    """The keys of the state and the new ones."""
    if x.state is None:
        return Keys(x.k, x.v, x.valid, 0, None)
    k = torch.cat((x.state["keys"], x.k), 2)
    v = torch.cat((x.state["values"], x.v), 2)
    new = torch.ones_like(x.k[:, 0, :, 0], dtype=torch.bool) if x.valid is None else x.valid
    shown = torch.cat((x.state["shown"], new), 1)
    state = {"keys": k, "values": v, "shown": shown}
    return Keys(k, v, shown, x.state["keys"].shape[2], state)


def with_score_terms(
    q: Tensor,
    k: Tensor,
    scale: float,
    row: Tensor | None,
    shown: Tensor | None,
    closed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k with more channels, so that scale q.k gains a term per query and hides keys.

    Args:
        q, k: (B, H, n, Dk), (B, Hkv, N, Dk).
        row: (B | 1, H | 1, n) float32 to add to all scores of a query, or None.
        shown: (B, N) bool, False at keys that nobody may see, or None.
        closed: for keys that lie in parts: (B, H, n, P) bool, the parts a query does not read, and
            (B, N) int64, the part of each key; or None.

    The term is carried in two channels, its rounded value and the rest, so bfloat16 keeps it.
    """
    if row is None and shown is None and closed is None:
        return q, k
    zero, one = torch.zeros_like(q[..., :1]), torch.ones_like(k[..., :1])
    high = low = zero
    if row is not None:
        wide = (row / scale).expand(q.shape[:3])[..., None]
        high = wide.to(q.dtype)
        low = (wide - high.float()).to(q.dtype)
    hide = torch.zeros_like(one)
    if shown is not None:
        hide = hide.masked_fill(~shown[:, None, :, None], -_ROOT)
    more_q, more_k = [q, high, low, zero + _ROOT / scale], [k, one, one, hide]
    if closed is not None:
        unread, part = closed
        lies_in = F.one_hot(part, unread.shape[-1])[:, None].to(k.dtype)
        more_q.append(unread.to(q.dtype) * (-_ROOT / scale))
        more_k.append(_ROOT * lies_in.expand(-1, k.shape[1], -1, -1))
    wide_q, wide_k = torch.cat(more_q, -1), torch.cat(more_k, -1)
    fill = -wide_q.shape[-1] % 8
    return F.pad(wide_q, (0, fill)), F.pad(wide_k, (0, fill))
