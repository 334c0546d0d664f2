"""Compiles generated C++ into a content-addressed cache and loads it.

The cache lies in $ATTENTION_REWRITER_CACHE/cpu, else in the user's cache directory. Its name of a
unit is a hash of everything the result depends on. A file appears in it by an atomic rename only,
so that any number of processes may compile the same unit and any of them may be killed; each
shared object ends with the hash of its bytes, and one that is damaged is compiled anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewriter.backends.cache import VARIABLE, cache_directory, temporary_directory
from rewriter.backends.cpu.compiler import Compiler as Compiler
from rewriter.backends.cpu.compiler import NoKernel as NoKernel
from rewriter.backends.cpu.compiler import find_compiler as find_compiler
from rewriter.backends.cpu.target import Target

FORMAT = "1"  # of the cache; raise it when the meaning of its files changes
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
_TRAILER = b"attention-rewriter:"
_STALE = 3600.0  # seconds after which a temporary file of another process counts as abandoned
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Unit:
    """A translation unit to be compiled for a target. `name` is for people who read the cache."""

    name: str
    source: str
    target: Target


def load(unit: Unit) -> ctypes.CDLL | NoKernel:
    """The compiled unit; from the cache if it is there."""
    return _load(unit, os.environ.get(VARIABLE), os.environ.get("CXX"))


def function(unit: Unit | str, name: str, argument: Any) -> Callable[[Any], None] | str:
    """A function of a unit that takes one argument, of a ctypes type, or why there is none.

    Args:
        unit: the unit, or why there is none.
    """
    library = NoKernel(unit) if isinstance(unit, str) else load(unit)
    if isinstance(library, NoKernel):
        return library.reason
    run = library[name]
    run.argtypes, run.restype = [argument], None
    found: Callable[[Any], None] = run
    return found


@lru_cache(maxsize=1024)
def _load(unit: Unit, root: str | None, cxx: str | None) -> ctypes.CDLL | NoKernel:
    compiler = find_compiler(cxx)
    if isinstance(compiler, NoKernel):
        return compiler
    path = built(unit, compiler, cache_directory("cpu"))
    if isinstance(path, NoKernel):
        return path
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return NoKernel(f"the compiled kernel {path} cannot be loaded: {error}")


def key(unit: Unit, compiler: Compiler) -> str:
    """Name of a unit in the cache."""
    parts = (FORMAT, compiler.version, *compiler.command, *FLAGS, *unit.target.flags)
    text = "\0".join((*parts, unit.target.isa, unit.source))
    return f"{unit.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def built(unit: Unit, compiler: Compiler, where: Path) -> Path | NoKernel:
    """Path of the compiled unit in `where`, compiled if it is missing or damaged."""
    path = where / f"{key(unit, compiler)}.so"
    if intact(path):
        return path
    problem = _compile(unit, compiler, path)
    if isinstance(problem, OSError):
        path = temporary_directory(where, problem.strerror or str(problem)) / path.name
        problem = None if intact(path) else _compile(unit, compiler, path)
    if problem is not None:
        reason = problem.reason if isinstance(problem, NoKernel) else str(problem)
        return NoKernel(f"the kernel {unit.name} could not be compiled: {reason}")
    return path


def intact(path: Path) -> bool:
    """Whether a shared object is there and ends with the hash of its own bytes."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    body, mark, digest = data.rpartition(_TRAILER)
    return bool(mark) and digest == hashlib.sha256(body).hexdigest().encode()


def _compile(unit: Unit, compiler: Compiler, path: Path) -> NoKernel | OSError | None:
    """Compile to `path`. An OSError means that the directory cannot take the files."""
    _sweep(path.parent)
    stem = path.parent / f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    source, binary = stem.with_suffix(".tmp.cpp"), stem.with_suffix(".tmp.so")
    try:
        source.write_text(unit.source)
        command = [*compiler.command, *FLAGS, *unit.target.flags, str(source), "-o", str(binary)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return NoKernel(f"{compiler.command[0]} took more than {_TIMEOUT:.0f} s")
        if done.returncode != 0:
            return _failure(done.stderr, path.parent)
        data = binary.read_bytes()
        with binary.open("ab") as file:
            file.write(_TRAILER + hashlib.sha256(data).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        source.replace(path.with_suffix(".cpp"))
        binary.replace(path)
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            source.unlink(missing_ok=True)
            binary.unlink(missing_ok=True)
    return None


def _failure(stderr: str, where: Path) -> NoKernel | OSError:
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
    telling = next((line for line in lines if "error" in line.lower()), lines[0])
    if "No space left" in stderr or "Read-only file system" in stderr:
        return OSError(28, f"{telling.strip()} in {where}")
    return NoKernel(telling.strip())


def _sweep(where: Path) -> None:
    """Remove what killed compiles left behind long ago."""
    try:
        for path in where.glob("*.tmp.*"):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink(missing_ok=True)
    except OSError:
        return  # another process was faster, or the directory cannot be changed
