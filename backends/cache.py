"""Where generated code is kept: one directory per person, safe for concurrent processes."""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

VARIABLE = "ATTENTION_REWRITER_CACHE"


def cache_directory(kind: str) -> Path:
    """A writable directory for generated files of one kind ('cpu', 'triton').

    It lies under $ATTENTION_REWRITER_CACHE, else $XDG_CACHE_HOME/attention_rewriter, else
    ~/.cache/attention_rewriter. Where that cannot be written, a temporary directory of this
    process takes its place after one warning: everything works, but nothing is kept.
    """
    chosen = os.environ.get(VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    root = Path(chosen).expanduser() if chosen else Path(home) / "attention_rewriter"
    wanted = root / kind
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        return temporary_directory(wanted, error.strerror or str(error))
    return wanted


@lru_cache(maxsize=16)
def temporary_directory(wanted: Path, why: str) -> Path:
    """The stand-in for a directory that cannot be written; says so once."""
    warnings.warn(
        f"generated kernels cannot be kept in {wanted} ({why}); they go to a temporary directory "
        f"and every process makes them anew. Set ${VARIABLE} to a writable directory.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Path(tempfile.mkdtemp(prefix="attention_rewriter-"))
