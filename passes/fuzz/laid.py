"""Tensors with named dimensions, so that pieces of a program fit together in every layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


def unflatten(t: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`Tensor.unflatten`, which carries no types."""
    out: Tensor = t.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Laid:
    """A tensor whose dimension d is named letters[d].

    b batch, h query heads, x key/value heads, g query heads per key/value head, n queries, m keys,
    d and e channels of keys and of values, f = b and h folded.
    """

    data: Tensor
    letters: str

    def of(self, data: Tensor) -> Laid:
        """The same names on other values."""
        return Laid(data, self.letters)

    def dim(self, letter: str) -> int:
        return self.letters.index(letter)

    def size(self, letter: str) -> int:
        return self.data.shape[self.dim(letter)]

    def to(self, letters: str, transposes: bool = False) -> Laid:
        """Permuted to another order, by one `permute` or by several `transpose`."""
        if letters == self.letters:
            return self
        if sorted(letters) != sorted(self.letters):
            raise ValueError(f"cannot permute {self.letters} to {letters}")
        if not transposes:
            order = [self.letters.index(c) for c in letters]
            return Laid(self.data.permute(order), letters)
        data, now = self.data, list(self.letters)
        for place, letter in enumerate(letters):
            other = now.index(letter)
            if other != place:
                data = data.transpose(place, other)
                now[place], now[other] = now[other], now[place]
        return Laid(data, letters)

    def fold(self) -> Laid:
        """b and h become one leading dimension f."""
        if "f" in self.letters:
            return self
        rest = self.letters.replace("b", "").replace("h", "")
        lead = self.to("bh" + rest)
        return Laid(lead.data.reshape(-1, *lead.data.shape[2:]), "f" + rest)

    def unfold(self, heads: int) -> Laid:
        """The reverse of `fold`."""
        if "f" not in self.letters:
            return self
        data = self.data.reshape(-1, heads, *self.data.shape[1:])
        return Laid(data, "bh" + self.letters[1:])

    def grouped(self, kv_heads: int) -> Laid:
        """h becomes x and g."""
        if "g" in self.letters:
            return self
        at = self.dim("h")
        return Laid(unflatten(self.data, at, (kv_heads, -1)), self.letters.replace("h", "xg"))

    def ungrouped(self) -> Laid:
        """x and g become h."""
        if "g" not in self.letters:
            return self
        rest = self.letters.replace("g", "").replace("x", "xg")
        near = self.to(rest)
        at = near.dim("x")
        return Laid(near.data.flatten(at, at + 1), near.letters.replace("xg", "h"))

    def aligned(self, vector: Tensor, letters: str) -> Tensor:
        """`vector` with dimensions `letters`, reshaped to broadcast against this tensor."""
        order = [c for c in self.letters if c in letters]
        moved = vector.permute([letters.index(c) for c in order])
        for place, letter in enumerate(self.letters):
            if letter not in letters:
                moved = moved.unsqueeze(place)
        return moved
