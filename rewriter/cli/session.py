"""What every command does around its work: set the process up, keep stdout clean, say things."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console, RenderableType

from rewriter.errors import UsageError

# Nothing is ever fetched at run time, and loaders say nothing that the person did not ask for.
_ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

Json = Annotated[
    bool, typer.Option("--json", help="Write one JSON object to stdout instead of tables.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads to use.", show_default="all cores")
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback", help="Show the traceback of an error (or set REWRITER_TRACEBACK=1)."
    ),
]


@dataclass(frozen=True)
class Session:
    """Where a command writes: results to stdout, everything else to stderr.

    Attributes:
        as_json: the result is one JSON object.
        stdout: the real standard output; `sys.stdout` itself points at stderr meanwhile, so that
            no library can write into the result.
        tables: console on stdout.
        notes: console on stderr.
    """

    as_json: bool
    stdout: IO[str]
    tables: Console
    notes: Console

    def show(self, *parts: RenderableType) -> None:
        """Print tables, unless the result is JSON."""
        if self.as_json:
            return
        if self.tables.is_terminal:
            for part in parts:
                self.tables.print(part, markup=False)
            return
        with self.tables.capture() as captured:
            for part in parts:
                self.tables.print(part, markup=False)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        self.stdout.write("\n".join([*lines, ""]))

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the result as JSON, if that was asked for."""
        if self.as_json:
            text = json.dumps(plain(data), indent=2, allow_nan=False)
            self.stdout.write(text + "\n")
            self.stdout.flush()

    def warn(self, text: str) -> None:
        self.notes.print(f"warning: {text}", markup=False, soft_wrap=True, style="yellow")

    def note(self, text: str) -> None:
        self.notes.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A spinner on a terminal, nothing elsewhere."""
        if not self.notes.is_terminal:
            yield
            return
        with self.notes.status(text):
            yield


@contextmanager
def session(as_json: bool, threads: int | None = None) -> Iterator[Session]:
    """Prepare the process and keep `sys.stdout` free of anything but the result."""
    prepare(threads)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Session(as_json, stdout, console(stdout), console(sys.stderr))


def console(file: IO[str]) -> Console:
    """Plain text at 80 columns (or $COLUMNS) where the file is no terminal."""
    return Console(file=file, highlight=False, emoji=False)


def prepare(threads: int | None) -> None:
    """Set the environment, then import torch; must come before anything imports transformers."""
    os.environ.update(_ENVIRONMENT)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    for name in ("torch", "transformers", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)


def plain(value: Any) -> Any:
    """A value that strict JSON can hold: infinities are spelled, everything unknown is text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a target before minutes of work go into it.

    Raises:
        UsageError: it is a file.
        OutputError: it exists and may not be replaced, or cannot be written.
    """
    from rewriter.errors import OutputError

    if path.is_file():
        raise UsageError(f"{path} is a file; --out names the directory of the new checkpoint")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path} exists already; choose another --out or add --overwrite")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {path}: {parent} is not a directory you may write to")
