"""The recurrence in chunks of tokens: matrix products inside a chunk, the state between chunks.

Running sums of the log decay restart at every chunk, so they stay small, and every exponent that
is formed is a difference of two of them that is not positive. Catalogue: linear.md section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.reference.recurrence.flow import Flow, sum_dtype
from rewriter.backends.reference.recurrence.pairs import pair_weights

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """A flow cut into chunks of C tokens; the last one is filled up with tokens that do nothing.

    Attributes:
        q: (B, Hkv, count, C, G, Dk). k, v: (B, Hkv, count, C, Dk | W).
        total: (B, Hkv, count, C, 1 | Dk) running sum of g in the chunk with the token's own, or
            None without decay.
        rows: the same as seen by a reader: without the token's own g if reads are exclusive.
        before: the sum without the token's own g.
    """

    flow: Flow
    q: Tensor
    k: Tensor
    v: Tensor
    total: Tensor | None
    before: Tensor | None

    @property
    def rows(self) -> Tensor | None:
        return self.before if self.flow.exclusive else self.total

    def tokens(self, t: Tensor) -> Tensor:
        """(B, Hkv, n, e) to (B, Hkv, count, C, e)."""
        count, C = self.k.shape[2:4]
        tail = count * C - t.shape[2]
        return torch.unflatten(F.pad(t, (0, 0, 0, tail)) if tail else t, 2, (count, C))

    def decayed(self, t: Tensor, sums: Tensor | None) -> Tensor:
        """t (..., C, Dk) or (..., C, G, Dk) times exp(sums)."""
        if sums is None:
            return t
        factor = sums.to(t.dtype).exp()
        return t * (factor.unsqueeze(-2) if t.dim() > factor.dim() else factor)

    def to_end(self, t: Tensor) -> Tensor:
        """t (..., C, Dk) decayed from its token to the end of the chunk."""
        return self.decayed(t, None if self.total is None else self.total[..., -1:, :] - self.total)

    def weights(self, y: Tensor) -> Tensor:
        """(..., C * G, C) weights with which the queries read writes of y (..., C, Dk)."""
        strict = self.flow.exclusive
        return pair_weights(self.q, y, self.rows, self.total, strict=strict).flatten(-3, -2)

    def carry(self, written: Tensor, start: Tensor) -> list[Tensor]:
        """States before every chunk and after the last, from what each chunk adds to its own."""
        states = [start]
        for chunk, kept in zip(written.unbind(2), self.kept(), strict=True):
            last = states[-1]
            states.append(last + chunk if kept is None else torch.addcmul(chunk, last, kept))
        return states

    def kept(self) -> tuple[Tensor | None, ...]:
        """For each chunk, (B, Hkv, 1 | Dk, 1): what is left of the state after it."""
        if self.total is None:
            return (None,) * self.k.shape[2]
        left = self.total[..., -1:, :].to(self.k.dtype).exp()
        return left.transpose(-1, -2).unbind(2)

    def read(self, states: Tensor, writes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, H, n, W): the states before the chunks, and the (key, value) writes inside them."""
        out = self.decayed(self.q, self.rows).flatten(-3, -2) @ states
        for key, value in writes:
            out = out + self.weights(key) @ value
        B, Hkv, count, C, G, _ = self.q.shape
        out = out.view(B, Hkv, count * C, G, -1)
        if self.flow.bonus is not None:
            near = (self.q * (self.flow.bonus[:, None, None] * self.k).unsqueeze(-2)).sum(-1)
            near = near.unsqueeze(-1) * self.v.unsqueeze(-2)
            out = out + near.view_as(out)
        n = self.flow.q.shape[2]
        return out[:, :, :n].transpose(2, 3).reshape(B, Hkv * G, n, -1)


def cut(x: Flow) -> Chunks:
    """Cut n >= 1 tokens into chunks."""
    B, _, n, width = x.q.shape
    Hkv, G = x.k.shape[1], x.group
    C = min(CHUNK, 1 << (n - 1).bit_length())
    count = -(-n // C)
    tail = count * C - n

    def tokens(t: Tensor) -> Tensor:
        return torch.unflatten(F.pad(t, (0, 0, 0, tail)) if tail else t, 2, (count, C))

    q = F.pad(x.q, (0, 0, 0, tail)) if tail else x.q
    q = q.reshape(B, Hkv, G, count, C, width).permute(0, 1, 3, 4, 2, 5)
    total = before = None
    if x.g is not None:
        # Below this floor exp is 0; a finite number keeps inf - inf out of the differences.
        floor = -760.0 if x.g.dtype == torch.float64 else -120.0
        steps = tokens(x.g.clamp(min=floor).to(sum_dtype(x.g)))
        total = steps.cumsum(3)
        before = F.pad(total[..., :-1, :], (0, 0, 1, 0))
    return Chunks(x, q, tokens(x.k), tokens(x.v), total, before)


def scan_chunks(x: Flow, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scan without correction; arguments and result as in `tokens.scan_tokens`."""
    c = cut(x)
    begin = x.zero_state() if start is None else start
    written = c.to_end(c.k).transpose(-1, -2) @ c.v
    if c.total is None:
        sums = torch.cat((begin.unsqueeze(2), written), 2).cumsum(2)
        # The copy frees the states between the chunks.
        return c.read(sums[:, :, :-1], [(c.k, c.v)]), sums[:, :, -1].clone()
    states = c.carry(written, begin)
    return c.read(torch.stack(states[:-1], 2), [(c.k, c.v)]), states[-1]
