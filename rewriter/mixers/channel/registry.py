"""The channel mixers that can be named in a policy, by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from rewriter.errors import UsageError
from rewriter.mixers.channel.base import ChannelMixer

GROUP = "attention_rewriter.channel_mixers"


def names() -> tuple[str, ...]:
    """All registered names, sorted; loads nothing."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def get(name: str) -> type[ChannelMixer]:
    """The channel mixer of that name.

    Raises:
        UsageError: there is none, or it cannot be loaded.
    """
    point = next((p for p in entry_points(group=GROUP) if p.name == name), None)
    if point is None:
        raise UsageError(f"there is no channel mixer '{name}'; there are: {', '.join(names())}")
    try:
        mixer = point.load()
    except Exception as error:  # a plugin may fail in any way
        raise UsageError(f"the channel mixer '{name}' cannot be loaded: {error}") from error
    if not (isinstance(mixer, type) and issubclass(mixer, ChannelMixer)):
        raise UsageError(f"the channel mixer '{name}' is not a subclass of ChannelMixer")
    return mixer
