"""Classes that policies name, own and third-party, found by entry point.

Nothing is imported before it is asked for, so a broken plugin hurts only those who use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from rewriter.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """One entry point group.

    Attributes:
        group: its name.
        noun: what its classes are, for messages.
        base: of which they are subclasses; has an `info` with a `name`.
    """

    group: str
    noun: str
    base: type[T]

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted; loads nothing.

        Raises:
            UsageError: two packages register different classes under one name.
        """
        return tuple(sorted(self._points()))

    def get(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            UsageError: no such name, a name clash, or the plugin cannot be loaded.
        """
        points = self._points()
        if name not in points:
            close = get_close_matches(name, points, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "there are: "
            known = "" if close else ", ".join(sorted(points))
            raise UsageError(f"there is no {self.noun} '{name}'; {hint}{known}")
        return self._load(points[name])

    def available(self) -> dict[str, type[T]]:
        """Every class that loads, by name. One that does not is left out, and `get` says why.

        Raises:
            UsageError: two packages register different classes under one name.
        """
        found: dict[str, type[T]] = {}
        for name in self.names():
            try:
                found[name] = self.get(name)
            except UsageError:
                continue
        return found

    def _points(self) -> dict[str, EntryPoint]:
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = points.setdefault(point.name, point)
            if other.value != point.value:
                raise UsageError(
                    f"two {self.noun}s are registered as '{point.name}' ({other.value} and "
                    f"{point.value}); uninstall one of the packages"
                )
        return points

    def _load(self, point: EntryPoint) -> type[T]:
        where = f"the {self.noun} '{point.name}' ({point.value})"
        try:
            loaded: Any = point.load()
        except Exception as error:  # a plugin may fail in any way
            raise UsageError(f"{where} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise UsageError(f"{where} is not a subclass of {self.base.__name__}")
        called = getattr(loaded, "info").name  # noqa: B009 - every base of a group has one
        if called != point.name:
            raise UsageError(f"{where} calls itself '{called}'; make the names equal")
        return loaded
