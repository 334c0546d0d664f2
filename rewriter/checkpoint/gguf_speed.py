"""Reading a GGUF file once: transformers opens it for the config and again for the weights.

The reader of the gguf package takes a vocabulary apart string by string over a memory map, which
takes seconds for each opening, and the table of tensor names is made anew for every module. Inside
`quick_reading` a file is opened once, over a plain view of the map, and the table is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def quick_reading(opened: dict[Path, Any]) -> Iterator[None]:
    """While inside, `gguf.GGUFReader` and `gguf.get_tensor_name_map` are quick ones.

    Args:
        opened: readers by file; pass the same dict to read a file only once.
    """
    import gguf  # an optional dependency

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    quick = _quick(reader)

    def open_once(path: Any, mode: str = "r") -> Any:
        key = Path(path).resolve()
        if key not in opened:
            opened[key] = quick(path, mode)
        return opened[key]

    gguf.GGUFReader, gguf.get_tensor_name_map = open_once, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@functools.cache
def _quick(reader: Any) -> Any:
    """The reader over a plain array: slices of a memory map are slow objects."""

    class Quick(reader):
        _plain: np.ndarray[Any, Any] | None = None

        def _get(
            self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
        ) -> np.ndarray[Any, Any]:
            if self._plain is None:
                self._plain = np.asarray(self.data)
            kind = _swapped(np.dtype(dtype), override_order or self.byte_order)
            stop = offset + kind.itemsize * int(count)
            return self._plain[offset:stop].view(kind)

    return Quick


@functools.cache
def _swapped(kind: np.dtype[Any], order: Any) -> np.dtype[Any]:
    return kind.newbyteorder(order)
