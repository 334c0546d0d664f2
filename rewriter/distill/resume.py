"""Checkpoints of a running distillation: safetensors and JSON, written atomically.

A checkpoint is a directory `<stage>-<step>` that appears by one rename, so a process killed at any
moment leaves only complete ones. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rewriter.errors import InputError, OutputError, UsageError

FORMAT = 1
KEEP = 2
_NAME = re.compile(r"(layers|logits|long)-(\d+)")
_ORDER = {"layers": 0, "logits": 1, "long": 2}


@dataclass(frozen=True)
class Snapshot:
    """Everything that the rest of a run depends on.

    Attributes:
        stage: stage it belongs to.
        step: optimiser steps done in that stage.
        elapsed: training seconds spent in that stage.
        digest: identity of the run (config, data, models).
        tensors: trained values `value.<name>`, optimiser state `<slot>.<name>`, and `rng`.
    """

    stage: str
    step: int
    elapsed: float
    digest: str
    tensors: Mapping[str, torch.Tensor]


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot and delete all but the newest `KEEP`.

    Raises:
        OutputError: the folder cannot be written.
    """
    target = folder / f"{snapshot.stage}-{snapshot.step:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    header = {
        "format": FORMAT,
        "stage": snapshot.stage,
        "step": snapshot.step,
        "elapsed": snapshot.elapsed,
        "digest": snapshot.digest,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):  # left by a killed run
            shutil.rmtree(stale)
        temporary.mkdir()
        save_file(
            {k: v.detach().contiguous() for k, v in snapshot.tensors.items()},
            temporary / "state.safetensors",
        )
        (temporary / "state.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        if target.exists():  # the same step of an earlier, abandoned attempt
            shutil.rmtree(target)
        temporary.replace(target)
        _sync(folder)
        for old in _found(folder)[:-KEEP]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"The checkpoint '{target}' cannot be written ({error}).") from error
    return target


def latest(folder: Path, digest: str) -> Snapshot | None:
    """The newest snapshot in a folder, or None if there is none.

    Raises:
        InputError: a snapshot that cannot be read.
        UsageError: it belongs to another run.
    """
    found = _found(folder)
    if not found:
        return None
    path = found[-1]
    try:
        header = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        stage, step = str(header["stage"]), int(header["step"])
        elapsed, owner = float(header["elapsed"]), str(header["digest"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"The checkpoint '{path}' cannot be read ({error}): delete it to resume from an "
            "earlier one."
        ) from error
    if owner != digest:
        raise UsageError(
            f"The checkpoint '{path}' belongs to a run with another config, text or model: give "
            "another folder, or delete it to start again."
        )
    return Snapshot(stage, step, elapsed, owner, tensors)


def _found(folder: Path) -> list[Path]:
    keyed = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            keyed.append((_ORDER[match[1]], int(match[2]), path))
    return [path for _, _, path in sorted(keyed)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
