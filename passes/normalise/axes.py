"""Axis labels: which logical axes a dimension holds, tracked through reshapes by factoring.

A dimension carries a tuple of axis ids, outermost first; () is a dimension of size 1. An axis can
be split into factors later on, when a reshape shows that it was a product (batch times heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Labels = tuple[tuple[int, ...], ...]


class Axes:
    """Axis ids with their sizes, and how they were split."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}

    def new(self, size: int) -> tuple[int, ...]:
        """A dimension of one fresh axis; a size of 1 needs no axis."""
        if size == 1:
            return ()
        self._size.append(size)
        return (len(self._size) - 1,)

    def fresh(self, sizes: Iterable[int]) -> Labels:
        """Fresh axes for a whole shape."""
        return tuple(self.new(s) for s in sizes)

    def size(self, axis: int) -> int:
        return self._size[axis]

    def total(self, axes: Iterable[int]) -> int:
        out = 1
        for axis in axes:
            out *= self._size[axis]
        return out

    def leaves(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The axes with all later splits applied."""
        out: list[int] = []
        for axis in axes:
            parts = self._parts.get(axis)
            out.extend((axis,) if parts is None else self.leaves(parts))
        return tuple(out)

    def resolve(self, labels: Labels) -> Labels:
        return tuple(self.leaves(dim) for dim in labels)

    def split(self, axis: int, outer: int) -> tuple[int, int]:
        """Split an axis into (outer, rest); the outer size must divide it."""
        rest = self._size[axis] // outer
        parts = (*self.new(outer), *self.new(rest))
        self._parts[axis] = parts
        return parts[0], parts[1]

    def regroup(self, labels: Labels, shape: Sequence[int]) -> Labels | None:
        """Labels of the same elements, in the same order, seen in another shape.

        None if the shape cuts across axes in a way no product of axes explains.
        """
        stream = [axis for dim in self.resolve(labels) for axis in dim]
        out: list[tuple[int, ...]] = []
        for size in shape:
            taken: list[int] = []
            left = size
            while left > 1:
                if not stream:
                    return None
                axis = stream.pop(0)
                if left % self._size[axis] == 0:
                    taken.append(axis)
                    left //= self._size[axis]
                elif self._size[axis] % left == 0:
                    outer, rest = self.split(axis, left)
                    taken.append(outer)
                    stream.insert(0, rest)
                    left = 1
                else:
                    return None
            out.append(tuple(taken))
        return tuple(out) if not stream else None
