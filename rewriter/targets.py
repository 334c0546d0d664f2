"""From a mixer name and raw options to a mixer class and validated options."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from rewriter.documents import Location, did_you_mean, fields_at
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.mixers.base import Mixer, MixerOptions
    from rewriter.mixers.channel.base import ChannelMixer, ChannelOptions

Checked = TypeVar("Checked", bound=BaseModel)


@dataclass(frozen=True)
class Target:
    """A mixer that exists, with options it accepts."""

    mixer: type[Mixer]
    options: MixerOptions


@dataclass(frozen=True)
class TargetProblem:
    """What is wrong, and where relative to the rule or decision that names the target.

    Attributes:
        location: ('use',) for the name, ('options', ...) for an option.
        message: one sentence without the place.
        at_key: the offence is a key, not its value.
    """

    location: Location
    message: str
    at_key: bool = False


@dataclass(frozen=True)
class ChannelTarget:
    """A channel mixer that exists, with options it accepts."""

    mixer: type[ChannelMixer]
    options: ChannelOptions


Found = Target | ChannelTarget


def resolve_channel(name: str, options: Mapping[str, Any]) -> ChannelTarget | TargetProblem:
    """As `resolve`, for what an MLP block is rewritten to."""
    registry = importlib.import_module("rewriter.mixers.channel.registry")
    known = registry.names()
    if name not in known:
        hint = did_you_mean(name, known)
        return TargetProblem(("use",), f"unknown channel mixer '{name}'{hint}")
    try:
        mixer: type[ChannelMixer] = registry.get(name)
    except UsageError as error:
        return TargetProblem(("use",), str(error))
    checked = _validated(name, mixer.Options, options)
    return checked if isinstance(checked, TargetProblem) else ChannelTarget(mixer, checked)


def names() -> tuple[str, ...]:
    """Names of all registered mixers; a plugin that does not load is among them."""
    registry = importlib.import_module("rewriter.mixers.registry")
    return tuple(str(name) for name in getattr(registry, "names", registry.available)())


def resolve(name: str, options: Mapping[str, Any]) -> Target | TargetProblem:
    """Find the mixer and validate its options; the first problem is returned, not raised."""
    known = names()
    if name not in known:
        return TargetProblem(("use",), f"unknown mixer '{name}'{did_you_mean(name, known)}")
    registry = importlib.import_module("rewriter.mixers.registry")
    try:
        mixer: type[Mixer] = registry.get(name)
    except UsageError as error:  # a third-party mixer that does not load
        return TargetProblem(("use",), str(error))
    checked = _validated(name, mixer.Options, options)
    return checked if isinstance(checked, TargetProblem) else Target(mixer, checked)


def _validated(
    name: str, kind: type[Checked], options: Mapping[str, Any]
) -> Checked | TargetProblem:
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location: Location = ("options", *first["loc"])
        key = str(location[-1])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, fields_at(kind, first["loc"][:-1]))
            return TargetProblem(location, f"'{name}' has no option '{key}'{hint}", at_key=True)
        message = first["msg"].removeprefix("Value error, ")
        subject = f"option '{key}' of '{name}'" if first["loc"] else f"the options of '{name}'"
        if first["type"] == "missing":
            return TargetProblem(location, f"{subject} is missing")
        shown = f", not {first['input']!r}" if first["loc"] else ""
        return TargetProblem(location, f"{subject}: {message[:1].lower()}{message[1:]}{shown}")
