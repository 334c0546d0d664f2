"""The mixers that can be named in a policy, own and third-party, found by entry point.

Group `attention_rewriter.mixers`, one class each. Nothing is imported before it is asked for, so a
broken plugin hurts only those who use it.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer

GROUP = "attention_rewriter.mixers"


def names() -> tuple[str, ...]:
    """All registered names, sorted; loads nothing.

    Raises:
        UsageError: two packages register different mixers under one name.
    """
    return tuple(sorted(_points()))


def get(name: str) -> type[Mixer]:
    """The mixer of that name.

    Raises:
        UsageError: no such name, a name clash, or the plugin cannot be loaded.
    """
    points = _points()
    if name not in points:
        close = get_close_matches(name, points, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else "there are: "
        known = "" if close else ", ".join(sorted(points))
        raise UsageError(f"there is no mixer '{name}'; {hint}{known}")
    return _load(points[name])


def available() -> dict[str, type[Mixer]]:
    """Every mixer that loads, by name. A plugin that does not load is left out here, and `get`
    says why.

    Raises:
        UsageError: two packages register different mixers under one name.
    """
    found: dict[str, type[Mixer]] = {}
    for name in names():
        try:
            found[name] = get(name)
        except UsageError:
            continue
    return found


def _points() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            raise UsageError(
                f"two mixers are registered as '{point.name}' ({other.value} and {point.value}); "
                "uninstall one of the packages"
            )
    return points


def _load(point: EntryPoint) -> type[Mixer]:
    try:
        mixer = point.load()
    except Exception as error:  # a plugin may fail in any way
        raise UsageError(
            f"the mixer '{point.name}' ({point.value}) cannot be loaded: {error}"
        ) from error
    if not (isinstance(mixer, type) and issubclass(mixer, Mixer)):
        raise UsageError(f"the mixer '{point.name}' ({point.value}) is not a subclass of Mixer")
    if mixer.info.name != point.name:
        raise UsageError(
            f"the mixer registered as '{point.name}' ({point.value}) calls itself "
            f"'{mixer.info.name}'; make the names equal"
        )
    return mixer
