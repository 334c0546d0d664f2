"""Inputs and outputs of the teacher's modules on disk, batch by batch.

A folder of parts, each of which appears by one rename and is complete: `index.json` says what every
module was called with, and a safetensors file for each module holds the tensors. A tensor that
occurs again in a part (rotary tables, masks) is kept once. Batches go by the hash of their tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.atomic import directory
from rewriter.distill.calls import described, restored
from rewriter.distill.data import Rows
from rewriter.distill.originals import Originals, Visit
from rewriter.distill.shards import MappedShard, ShardWriter, raw
from rewriter.errors import InputError

FORMAT = 1
PART_BYTES = 2**29
INDEX = "index.json"


class _Once:
    """Where a tensor is kept, by its content."""

    def __init__(self) -> None:
        self._places: dict[bytes, list[Any]] = {}

    def key(self, tensor: torch.Tensor) -> bytes:
        hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(raw(tensor))
        return hasher.digest()

    def get(self, key: bytes) -> list[Any] | None:
        return self._places.get(key)

    def keep(self, key: bytes, place: list[Any]) -> list[Any]:
        self._places[key] = place
        return place


class _Part:
    """A part while it is written."""

    def __init__(self, folder: Path, paths: Sequence[str]):
        self._folder = folder
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._files = [ShardWriter(folder / _file(number)) for number in self._numbers.values()]
        self._once = _Once()
        self._batches: dict[str, dict[str, list[Any]]] = {}
        self.bytes = 0

    @property
    def full(self) -> bool:
        return self.bytes >= PART_BYTES or any(file.full for file in self._files)

    def look(self, batch: str) -> Visit:
        """What the teacher's forward of a batch shows to."""
        calls = self._batches.setdefault(batch, {path: [] for path in self._numbers})

        def look(path: str, args: Any, kwargs: dict[str, Any], target: torch.Tensor) -> None:
            number = self._numbers[path]

            def add(tensor: torch.Tensor) -> list[Any]:
                self.bytes += tensor.numel() * tensor.element_size()
                return [number, self._files[number].add(tensor)]

            def once(tensor: torch.Tensor) -> list[Any]:
                key = self._once.key(tensor)
                return self._once.get(key) or self._once.keep(key, add(tensor))

            given = described([args, kwargs], once)
            calls[path].append({"given": given, "target": described(target, add)})

        return look

    def close(self) -> None:
        for file in self._files:
            file.close()
        index = {"format": FORMAT, "batches": self._batches}
        (self._folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


class Activations:
    """What some modules of the teacher were called with and returned, in a folder.

    It is a source of calls as `Originals` is, without the teacher.

    Attributes:
        paths: of the modules.
        runs: calls of each in one forward.
    """

    def __init__(self, folder: Path, paths: Sequence[str], device: torch.device):
        """Args:
            folder: where the parts are or will be.
            paths: of the modules.
            device: where the tensors go.

        Raises:
            InputError: a part cannot be read.
        """
        self.folder, self.paths, self.device = folder, tuple(paths), device
        self.runs: dict[str, int] = {}
        self._where: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._open: dict[Path, MappedShard] = {}
        for part in sorted(folder.glob("part-*")):
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            index = json.loads((part / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}")
            batches = dict(index["batches"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The stored activations '{part}' cannot be read ({error}): delete that folder to "
                "have them made again."
            ) from error
        for batch, calls in batches.items():
            self._where[batch] = (part, calls)
            self.runs = {path: len(calls[path]) for path in self.paths}

    def __contains__(self, batch: str) -> bool:
        return batch in self._where

    def capture(self, originals: Originals, batches: Mapping[str, Rows]) -> Iterator[int]:
        """Run the teacher on the batches that are not there yet.

        Yields:
            Batches done, of all that were missing, after each.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
            UsageError: arguments that cannot be kept.
        """
        missing = [batch for batch in batches if batch not in self]
        done = 0
        while done < len(missing):
            target = self.folder / f"part-{len(list(self.folder.glob('part-*'))):05d}"
            with directory(target) as folder:
                part = _Part(folder, self.paths)
                while done < len(missing) and not part.full:
                    originals.visit(batches[missing[done]], part.look(missing[done]))
                    done += 1
                    yield done
                part.close()
            self._read(target)

    def visit(self, rows: Rows, look: Visit, only: Sequence[str] | None = None) -> dict[str, int]:
        """Show the calls of a batch, as `Originals.visit` does, and give the memory back.

        Args:
            only: modules to show, or None for all.
        """
        part, calls = self._where[rows.digest()]

        def get(place: Any) -> torch.Tensor:
            path = part / _file(place[0])
            if path not in self._open:
                self._open[path] = MappedShard(path)
            return self._open[path].tensor(place[1]).to(self.device)

        try:
            for path in self.paths if only is None else only:
                for item in calls[path]:
                    args, kwargs = restored(item["given"], get)
                    look(path, tuple(args), kwargs, restored(item["target"], get))
        finally:
            for shard in self._open.values():
                shard.give_back()
        return {path: len(calls[path]) for path in self.paths}

    def remove(self) -> None:
        """Delete the folder."""
        self._open.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class OneModule:
    """The stored calls of a single module."""

    store: Activations
    path: str

    @property
    def runs(self) -> dict[str, int]:
        return {self.path: self.store.runs[self.path]}

    def visit(self, rows: Rows, look: Visit) -> dict[str, int]:
        return {self.path: self.store.visit(rows, look, [self.path])[self.path]}


def batch_bytes(originals: Originals, rows: Rows) -> dict[str, int]:
    """Bytes that each module's inputs and outputs of one batch take on disk; what is shared counts
    with the first. One forward of the teacher, in which nothing is written.

    Raises:
        UsageError: arguments that cannot be kept.
    """
    once, out = _Once(), dict.fromkeys(originals.paths, 0)

    def look(path: str, args: Any, kwargs: dict[str, Any], target: torch.Tensor) -> None:
        def add(tensor: torch.Tensor) -> list[Any]:
            out[path] += tensor.numel() * tensor.element_size()
            return [path]

        def new(tensor: torch.Tensor) -> list[Any]:
            key = once.key(tensor)
            return once.get(key) or once.keep(key, add(tensor))

        described([args, kwargs], new)
        described(target, add)

    originals.visit(rows, look)
    return out


def _file(number: int) -> str:
    return f"{number:04d}.safetensors"
