"""Values of a step program: strided views of numbers in an arena or of a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

Shape = tuple[int, ...]


class UnsupportedStepError(Exception):
    """The step cannot be listed; caught inside the pass and turned into the reason why not."""


@dataclass(eq=False)
class Buffer:
    """Numbers of the arena. `at` is their place, in floats, once it is planned."""

    size: int
    pinned: bool = False
    at: int = -1


@dataclass(frozen=True)
class Weight:
    """A parameter, buffer or constant of the model, by the name under which it is read."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Value:
    """A strided view. Offset and strides count elements; `dtype` is that of the model's tensor."""

    base: Buffer | Weight
    shape: Shape
    strides: Shape
    dtype: torch.dtype
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        wanted = row_major(self.shape)
        return all(
            n == 1 or s == w for n, s, w in zip(self.shape, self.strides, wanted, strict=True)
        )


@dataclass(frozen=True)
class Unknown:
    """An input whose values the step does not know; only its sizes may be read."""

    shape: Shape


def row_major(shape: Sequence[int]) -> Shape:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def dim_of(value: Value, dim: int, more: int = 0) -> int:
    return dim + len(value.shape) + more if dim < 0 else dim


def permuted(x: Value, order: Sequence[int]) -> Value:
    order = [dim_of(x, d) for d in order]
    shape, strides = tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order)
    return replace(x, shape=shape, strides=strides)


def swapped(x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.shape)))
    a, b = dim_of(x, a), dim_of(x, b)
    order[a], order[b] = order[b], order[a]
    return permuted(x, order)


def sliced(x: Value, dim: int, start: int | None, end: int | None, step: int = 1) -> Value:
    dim = dim_of(x, dim)
    begin, stop, step = slice(start, end, step).indices(x.shape[dim])
    size = max(0, -(-(stop - begin) // step))
    if size == 0:
        raise UnsupportedStepError("an empty slice")
    shape, strides = list(x.shape), list(x.strides)
    offset = x.offset + begin * strides[dim]
    shape[dim], strides[dim] = size, strides[dim] * step
    return replace(x, shape=tuple(shape), strides=tuple(strides), offset=offset)


def selected(x: Value, dim: int, index: int) -> Value:
    dim = dim_of(x, dim)
    index = index + x.shape[dim] if index < 0 else index
    return squeezed(sliced(x, dim, index, index + 1), dim)


def squeezed(x: Value, dim: int) -> Value:
    dim = dim_of(x, dim)
    if x.shape[dim] != 1:
        return x
    keep = [d for d in range(len(x.shape)) if d != dim]
    return permuted_subset(x, keep)


def permuted_subset(x: Value, keep: Sequence[int]) -> Value:
    return replace(
        x, shape=tuple(x.shape[d] for d in keep), strides=tuple(x.strides[d] for d in keep)
    )


def unsqueezed(x: Value, dim: int) -> Value:
    dim = dim_of(x, dim, 1)
    return replace(
        x,
        shape=(*x.shape[:dim], 1, *x.shape[dim:]),
        strides=(*x.strides[:dim], 0, *x.strides[dim:]),
    )


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape that both broadcast to."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def expanded(x: Value, shape: Sequence[int]) -> Value:
    """Broadcast to `shape`; -1 keeps a size."""
    more = len(shape) - len(x.shape)
    old, strides = (1,) * more + x.shape, (0,) * more + x.strides
    wide = tuple(o if s == -1 else s for o, s in zip(old, shape, strict=True))
    if any(o not in (1, w) for o, w in zip(old, wide, strict=True)):
        raise UnsupportedStepError(f"{x.shape} cannot be broadcast to {tuple(shape)}")
    steps = tuple(s if o == w else 0 for o, w, s in zip(old, wide, strides, strict=True))
    return replace(x, shape=wide, strides=steps)


def sized(shape: Sequence[int], numel: int) -> Shape:
    """`shape` with its -1 filled in."""
    known = math.prod(n for n in shape if n != -1)
    return tuple(numel // known if n == -1 else n for n in shape)


def viewed(x: Value, shape: Sequence[int]) -> Value | None:
    """The same numbers in another shape without moving them, or None where that is impossible."""
    shape = sized(shape, x.numel)
    if x.contiguous:
        return replace(x, shape=shape, strides=row_major(shape))
    # Dimensions of both shapes in groups of equal products.
    old = [(n, s) for n, s in zip(x.shape, x.strides, strict=True) if n != 1]
    strides: list[int] = []
    for size in reversed(shape):
        if size == 1:
            strides.append(0)
            continue
        if not old:
            return None
        n, s = old.pop()
        while n < size and old and old[-1][1] == n * s:
            n *= old.pop()[0]
        if n % size:
            return None
        strides.append(s)
        if n > size:
            old.append((n // size, s * size))
    return None if old else replace(x, shape=shape, strides=tuple(reversed(strides)))


@dataclass(eq=False)
class Draft:
    """One instruction on values, before places are known.

    Attributes:
        op: as in `backends.cpu.step`, or 'call' for a core that runs in Python.
        inputs: a, b and c.
        s, t: its numbers.
        core: of 'attend' and 'call': position of the core among the model's.
    """

    op: str
    out: Value
    inputs: tuple[Value | None, ...]
    s: float = 0.0
    t: float = 0.0
    core: int = -1
    room: Buffer | None = None
    extra: dict[str, int] = field(default_factory=dict)

    def buffers(self) -> list[Buffer]:
        """Everything in the arena that it touches."""
        values = [self.out, *(v for v in self.inputs if v is not None)]
        found = [v.base for v in values if isinstance(v.base, Buffer)]
        return found if self.room is None else [*found, self.room]


def plan_arena(drafts: Sequence[Draft]) -> int:
    """Give every buffer a place, those that are no longer needed making room; floats in all."""
    last: dict[Buffer, int] = {}
    for n, draft in enumerate(drafts):
        for buffer in draft.buffers():
            last[buffer] = n
    top = 0
    free: list[tuple[int, int]] = []  # (place, size)
    ending: dict[int, list[Buffer]] = {}
    for buffer, n in last.items():
        if not buffer.pinned:
            ending.setdefault(n, []).append(buffer)
    for n, draft in enumerate(drafts):
        for buffer in draft.buffers():
            if buffer.at >= 0:
                continue
            size = -(-buffer.size // 16) * 16
            slot = next((i for i, (_, room) in enumerate(free) if room == size), None)
            if slot is None:
                buffer.at, top = top, top + size
            else:
                buffer.at = free.pop(slot)[0]
        free += [(b.at, -(-b.size // 16) * 16) for b in ending.get(n, ())]
    return top
