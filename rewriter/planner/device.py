"""A device as data: peak rates that its maker states, or times that were measured on it.

A named device has rates only. A measured one (`rewriter profile`) also has times of products,
pointwise operations and cores, and predictions interpolate between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewriter.atomic import write_file
from rewriter.backends.cache import cache_directory
from rewriter.bench.machine import Machine, this_machine
from rewriter.documents import Document, did_you_mean, explain, parse, read_text
from rewriter.errors import UsageError
from rewriter.planner.work import Phase

DEVICE_VERSION = 1
DATA = Path(__file__).with_name("devices.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProductTime(_Strict):
    """Seconds of (rows, inputs) times a weight (inputs, outputs) that is not in the cache."""

    rows: int
    inputs: int
    outputs: int
    seconds: float = Field(gt=0)


class MoveTime(_Strict):
    """Seconds of one pointwise operation that reads and writes so many bytes in all."""

    bytes: float = Field(gt=0)
    seconds: float = Field(gt=0)


class CoreTime(_Strict):
    """Seconds of one core: batch 1, `tokens` at once, or one token behind `tokens` - 1 others.

    `heads` is (query, key/value, key width, value width), `hidden` the width of the stream.
    """

    mixer: str
    options: dict[str, Any] = Field(default_factory=dict)
    heads: tuple[int, int, int, int]
    hidden: int
    phase: Phase
    tokens: int = Field(ge=1)
    seconds: float = Field(gt=0)


class Device(_Strict):
    """What a prediction needs to know.

    Attributes:
        version: format of this document.
        name: for people.
        source: where the rates come from.
        dtype: of the measured times; '' for a device by name.
        threads, clock, torch: how it was measured.
        peak: operations a second by dtype, multiply-add counted as two.
        bandwidth: bytes a second.
        memory: bytes, 0 where it is not known.
        link: bytes a second to the host, 0 where there is none.
        efficiency: share of peak arithmetic and bandwidth that is reached where nothing was
            measured.
        launch: seconds an operation takes at least where nothing was measured.
        products, moves, cores: measured times.
    """

    version: int = DEVICE_VERSION
    name: str
    source: str
    dtype: str = ""
    threads: int = 0
    clock: Literal["", "wall", "cpu"] = ""
    torch: str = ""
    peak: dict[str, float]
    bandwidth: float = Field(gt=0)
    memory: float = 0.0
    link: float = 0.0
    efficiency: float = Field(default=0.7, gt=0, le=1)
    launch: float = Field(default=5e-6, ge=0)
    products: tuple[ProductTime, ...] = ()
    moves: tuple[MoveTime, ...] = ()
    cores: tuple[CoreTime, ...] = ()

    @property
    def measured(self) -> bool:
        return bool(self.products)

    def peak_of(self, dtype: str) -> float:
        """Operations a second in a dtype.

        Raises:
            UsageError: not known.
        """
        if dtype not in self.peak:
            raise UsageError(
                f"the profile of '{self.name}' has no peak for {dtype}; it knows "
                f"{', '.join(sorted(self.peak))}"
            )
        return self.peak[dtype]

    def save(self, path: Path) -> None:
        """Write as JSON, atomically; raises OutputError."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        write_file(path, (text + "\n").encode())

    @classmethod
    def load(cls, source: str | Path | Device) -> Device:
        """A profile file, a named device, or 'here': what was measured on this machine.

        Raises:
            UsageError: no such file or name, not a profile, or made by a newer version.
        """
        if isinstance(source, Device):
            return source
        known = named_devices()
        if isinstance(source, str) and source in known:
            return known[source]
        path = profile_path() if source == "here" else Path(source)
        if not path.exists():
            if source == "here":
                raise UsageError(
                    f"this machine was not measured yet ({path} is missing); run "
                    "'rewriter profile' first, or name a device"
                )
            raise UsageError(
                f"there is no profile '{source}'{did_you_mean(str(source), known)}; give a file "
                f"that 'rewriter profile --out' wrote, 'here', or one of {', '.join(known)}"
            )
        return cls._validated(parse(read_text(path, "profile"), str(path)))

    @classmethod
    def _validated(cls, document: Document) -> Device:
        data = document.data
        if not isinstance(data, Mapping):
            raise UsageError(f"{document.where(())}: a device profile is a JSON object")
        version = data.get("version", DEVICE_VERSION)
        if isinstance(version, int) and version != DEVICE_VERSION:
            raise UsageError(
                f"{document.where(('version',))}: this profile has format {version}, and this "
                f"version reads {DEVICE_VERSION}; measure again with 'rewriter profile'"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, document, cls) from None


def named_devices() -> dict[str, Device]:
    """Devices known by the figures of their makers."""
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return {name: Device.model_validate({"name": name, **fields}) for name, fields in data.items()}


def profile_path(
    machine: Machine | None = None, dtype: str = "float32", threads: int | None = None
) -> Path:
    """Where the profile of a machine lies in the user's cache directory."""
    found = machine or this_machine()
    count = threads if threads is not None else found.threads
    slug = re.sub(r"[^a-z0-9]+", "-", found.processor.lower()).strip("-")[:80]
    return cache_directory("profiles") / f"{slug}-{count}t-{dtype}.json"
