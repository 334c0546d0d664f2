"""The teacher's part of stage 1 from disk: which modules together, where, and whether they fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rewriter.atomic import write_file
from rewriter.budgets import size_in_bytes
from rewriter.distill.activations import Activations, batch_bytes
from rewriter.distill.config import DistillConfig, Stored
from rewriter.distill.copies import computes_in, hash_values, private_copy
from rewriter.distill.data import Rows
from rewriter.distill.originals import Originals
from rewriter.distill.precision import compute_dtype
from rewriter.distill.progress import Reporter
from rewriter.errors import OutputError

PLAN = "sweeps.json"
FOLDER = "activations"


@contextmanager
def place_of(options: Stored, folder: Path | None) -> Iterator[Path]:
    """Where activations go; unless the person named the folder it is deleted at the end."""
    if options.folder is not None:
        yield Path(options.folder)
    elif folder is None:
        with tempfile.TemporaryDirectory(prefix="activations-") as temporary:
            yield Path(temporary)
    else:
        yield folder / FOLDER  # after an error it stays: the run goes on from there
        shutil.rmtree(folder / FOLDER, ignore_errors=True)


@dataclass
class Teaching:
    """The teacher's part of stage 1 from disk.

    Attributes:
        place: where activations go.
        teacher, student: the models as given; they are not changed.
        config: with `layers.stored`.
        paths: of the modules that learn, in their order.
        batches: what the steps will use, by `Rows.digest`.
        reporter: told what is written.
    """

    place: Path
    teacher: nn.Module
    student: nn.Module
    config: DistillConfig
    paths: list[str]
    batches: Mapping[str, Rows]
    reporter: Reporter

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.config.dtype, self.teacher)
        config = getattr(self.teacher, "config", None)
        hasher = hashlib.sha256(f"{self.dtype} {self.paths} {config}".encode())
        hash_values(hasher, self.teacher)
        self.folder = self.place / hasher.hexdigest()[:16]

    def _originals(self, paths: Sequence[str]) -> Originals:
        teacher = self.teacher
        if not computes_in(teacher, self.dtype):
            teacher = private_copy(teacher, self.dtype, {})
        return Originals(teacher, {path: self.student.get_submodule(path) for path in paths})

    def sweeps(self) -> list[list[str]]:
        """Modules whose activations are on disk together, in their order.

        Raises:
            OutputError: the disk has no room for those of one module.
        """
        plan = self.folder / PLAN
        if plan.is_file():
            made = [[str(path) for path in sweep] for sweep in json.loads(plan.read_text())]
            if [path for sweep in made for path in sweep] == self.paths:
                return made
        first = next(iter(self.batches.values()))
        each = batch_bytes(self._originals(self.paths), first)
        total = {path: count * len(self.batches) for path, count in each.items()}
        made = self._split(total)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(plan, json.dumps(made).encode())
        self.reporter.message(
            f"activations of {len(self.paths)} modules and {len(self.batches)} batches: "
            f"{_size(sum(total.values()))} on disk"
            + (f", in {len(made)} passes of the teacher" if len(made) > 1 else "")
        )
        return made

    def _split(self, total: Mapping[str, int]) -> list[list[str]]:
        options = self.config.layers.stored if self.config.layers is not None else None
        base = next(p for p in (self.place, *self.place.absolute().parents) if p.is_dir())
        room = shutil.disk_usage(base).free
        if options is not None and options.disk is not None:
            room = min(room, size_in_bytes(options.disk))
        made: list[list[str]] = []
        used = room
        for path, need in total.items():
            if need > room:
                raise OutputError(
                    f"The activations of '{path}' take {_size(need)} on disk and {_size(room)} "
                    f"may be used at '{self.place}': train fewer steps, or give 'stored' another "
                    "'folder' or a larger 'disk'."
                )
            if used + need > room:
                made.append([])
                used = 0
            made[-1].append(path)
            used += need
        return made

    def stored(self, sweep: Sequence[str]) -> Activations:
        """The activations of some modules, of which those that are missing are made."""
        name = f"{self.paths.index(sweep[0]):04d}-{self.paths.index(sweep[-1]):04d}"
        device = next(self.student.parameters()).device
        store = Activations(self.folder / name, sweep, device)
        if all(batch in store for batch in self.batches):
            return store
        begun = time.monotonic()
        for _ in store.capture(self._originals(sweep), self.batches):
            pass
        self.reporter.message(
            f"activations of {len(sweep)} modules stored in {time.monotonic() - begun:.0f} s"
        )
        return store


def _size(count: int) -> str:
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= worth:
            return f"{count / worth:.1f} {unit}"
    return f"{count} bytes"
