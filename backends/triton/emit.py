"""From a template and the features of a spec to an imported module of kernels.

A kernel is a file: rendered once, kept in the cache under the hash of its text, and imported from
there, because Triton reads the source of what it compiles. Files appear by an atomic rename, so
two processes may emit the same kernel at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import secrets
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rewriter.backends.cache import cache_directory

FLOOR = -88.0  # exp of less than this is 0 in float32; also keeps -inf out of running sums


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


@lru_cache(maxsize=512)
def render(template: str, **features: Any) -> str:
    """Source text of a kernel file; equal features give equal text."""
    text = _environment().get_template(f"{template}.py.jinja").render(floor=FLOOR, **features)
    text = re.sub(r"\n(?:[ ]*\n){3,}", "\n\n\n", re.sub(r"[ ]+\n", "\n", text))
    # Blank lines inside a function are left over from features that are off.
    return re.sub(r"\n\n+(?=    )", "\n", text).strip("\n") + "\n"


@lru_cache(maxsize=512)
def emit(template: str, **features: Any) -> ModuleType:
    """The imported module of a kernel file.

    Args:
        template: name of a file in `templates`, without its suffixes.
        features: hashable values the template asks for.
    """
    return load(template, render(template, **features))


def load(name: str, source: str) -> ModuleType:
    """Write a source file into the cache, if it is not there yet, and import it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:20]
    path = cache_directory("triton") / f"{name}_{digest}.py"
    if not path.exists() or path.read_text() != source:
        partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}")
        partial.write_text(source)
        partial.replace(path)
    qualified = f"rewriter_generated_{name}_{digest}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    place = importlib.util.spec_from_file_location(qualified, path)
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[qualified] = module
    place.loader.exec_module(module)
    return module
