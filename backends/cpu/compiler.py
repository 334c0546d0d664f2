"""The C++ compiler: which one it is and whether it knows a set of instructions."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class NoKernel:
    """Why there is no compiled kernel, as one sentence."""

    reason: str


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called and what it says it is."""

    command: tuple[str, ...]
    version: str


def find_compiler(cxx: str | None = None) -> Compiler | NoKernel:
    """The compiler that $CXX names, else g++, else clang++; warns once if there is none."""
    return _probe(cxx, os.environ.get("PATH"))


@lru_cache(maxsize=8)
def _probe(cxx: str | None, path: str | None) -> Compiler | NoKernel:
    for words in [cxx.split()] if cxx else [["g++"], ["clang++"], ["c++"]]:
        executable = shutil.which(words[0], path=path)
        if executable is None:
            continue
        command = (executable, *words[1:])
        try:
            seen = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(command, seen.stdout.splitlines()[0] if seen.stdout else "")
    name = f"the compiler {cxx!r} of $CXX" if cxx else "a C++ compiler (g++ or clang++)"
    reason = f"{name} was not found, so no CPU kernel can be generated; install one"
    warnings.warn(f"{reason}. Slower kernels are used.", RuntimeWarning, stacklevel=2)
    return NoKernel(reason)


@lru_cache(maxsize=32)
def knows(compiler: Compiler, flags: tuple[str, ...], instruction: str) -> bool:
    """Whether a compiler takes flags, and its assembler an instruction."""
    code = f'void f() {{ asm volatile("{instruction}"); }}'
    command = [*compiler.command, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    try:
        done = subprocess.run(
            command, input=code, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
