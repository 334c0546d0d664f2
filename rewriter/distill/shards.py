"""Safetensors files that are written tensor by tensor and read through maps of the file.

The header of the format comes first, so room is left for it and it is written last, filled up with
blanks (https://github.com/huggingface/safetensors). Between tensors there may be no gap: a byte
tensor of no meaning brings each to an address that any kernel can read from.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewriter.checkpoint.headers import read_header
from rewriter.errors import UsageError

ALIGNMENT = 64
ROOM = 2**18 - 8  # bytes for the header
ENTRY = 160  # most bytes that a tensor and its filling take there
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; of one that lies so already without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


class ShardWriter:
    """One file that grows by a tensor at a time. Not valid before `close`."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._file.seek(8 + ROOM)
        self._header: dict[str, Any] = {}
        self._end = 0

    @property
    def full(self) -> bool:
        """Whether the header has no room for a hundred more tensors."""
        return (len(self._header) + 200) * ENTRY > ROOM

    def add(self, tensor: torch.Tensor) -> str:
        """Append a tensor; its name.

        Raises:
            UsageError: a dtype that the format lacks.
            OSError: it cannot be written.
        """
        if tensor.dtype not in _NAMES:
            raise UsageError(
                f"A rewritten module is called with tensors of {tensor.dtype}, which cannot be "
                "kept on disk: leave out 'stored' of the stage 'layers'."
            )
        filling = -self._end % ALIGNMENT
        if filling:
            self._append(f"fill.{len(self._header)}", "U8", [filling], memoryview(bytes(filling)))
        name = f"t{len(self._header)}"
        self._append(name, _NAMES[tensor.dtype], list(tensor.shape), raw(tensor))
        return name

    def _append(self, name: str, dtype: str, shape: list[int], data: memoryview) -> None:
        self._file.write(data)
        offsets = [self._end, self._end + len(data)]
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._end = offsets[1]

    def close(self) -> None:
        """Write the header."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(ROOM)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()


class MappedShard:
    """A file of tensors that are read when they are used.

    The map is private: a tensor that somebody writes to changes in memory alone.
    """

    def __init__(self, path: Path):
        """Raises:
        InputError: not such a file.
        """
        self._tensors = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        count, dtype = math.prod(info.shape), DTYPES[info.dtype]
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.start)
        return flat.reshape(info.shape)

    def give_back(self) -> None:
        """Give all pages back to the system; the tensors are read from the file when used again."""
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
