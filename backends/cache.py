"""Where generated code is kept: one directory per person, safe for concurrent processes."""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path

VARIABLE = "ATTENTION_REWRITER_CACHE"


@lru_cache(maxsize=16)
def cache_directory(kind: str) -> Path:
    """A writable directory for generated files of one kind ('cpu', 'triton').

    It lies under $ATTENTION_REWRITER_CACHE, else $XDG_CACHE_HOME/attention_rewriter, else
    ~/.cache/attention_rewriter. Where that cannot be written, a temporary directory of this
    process takes its place: everything works, but nothing is kept for the next run.
    """
    chosen = os.environ.get(VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    root = Path(chosen).expanduser() if chosen else Path(home) / "attention_rewriter"
    try:
        directory = root / kind
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"attention_rewriter-{kind}-"))
