"""A quick scan of a GGUF file: are all its parts there? Reads no weights.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts,
key-value entries, tensor entries (name, sizes, type, offset), padding, data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rewriter.errors import InputError

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8


class _DamagedError(Exception):
    pass


@dataclass
class _Cursor:
    data: mmap.mmap
    at: int

    def number(self, form: str) -> int:
        width = struct.calcsize(form)
        if self.at + width > len(self.data):
            raise _DamagedError("it ends inside its header")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += width
        return int(value)

    def skip(self, width: int) -> None:
        if self.at + width > len(self.data):
            raise _DamagedError("it ends inside its header")
        self.at += width

    def text(self) -> str:
        width = self.number("<Q")
        start = self.at
        self.skip(width)
        return self.data[start : self.at].decode("utf-8", "replace")

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY and depth < 4:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALAR_BYTES:
                self.skip(_SCALAR_BYTES[inner] * count)
            else:
                for _ in range(count):  # ends early, since every item moves the cursor
                    self.skip_value(inner, depth + 1)
        else:
            raise _DamagedError(f"an entry has the unknown type {kind}")


def scan(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> int:
    """Check that every entry and tensor of the file lies inside it; returns the tensor count.

    Args:
        path: a file that begins with the GGUF magic.
        block_sizes: tensor type -> (elements, bytes) of one block.

    Raises:
        InputError: truncated or corrupt; the first tensor that is cut off is named.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _scan(_Cursor(data, 4), block_sizes)
        except (_DamagedError, OverflowError) as error:
            raise InputError(f"{path} is truncated or corrupt: {error}; fetch it again") from None


def _scan(cursor: _Cursor, block_sizes: Mapping[int, tuple[int, int]]) -> int:
    version, tensors, entries = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise _DamagedError(f"it has the GGUF version {version}, and only 2 and 3 can be read")
    alignment = 32
    for _ in range(entries):
        key, kind = cursor.text(), cursor.number("<I")
        if key == "general.alignment" and kind == 4:
            alignment = cursor.number("<I")
        else:
            cursor.skip_value(kind)
    ends: list[tuple[str, int]] = []
    for _ in range(tensors):
        name, dims = cursor.text(), cursor.number("<I")
        if dims > _MAX_DIMS:
            raise _DamagedError(f"the tensor '{name}' claims {dims} dimensions")
        elements = math.prod(cursor.number("<Q") for _ in range(dims))
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if kind not in block_sizes:
            raise _DamagedError(f"the tensor '{name}' has the unknown type {kind}")
        block, width = block_sizes[kind]
        ends.append((name, offset + elements // block * width))
    if alignment < 1:
        raise _DamagedError("its alignment is zero")
    start = -(-cursor.at // alignment) * alignment
    for name, end in ends:
        if start + end > len(cursor.data):
            raise _DamagedError(
                f"the tensor '{name}' should end at byte {start + end} and the file has "
                f"{len(cursor.data)}"
            )
    return tensors
