"""Safetensors headers: read and checked by hand before any tensor is mapped.

The format: 8 bytes of little-endian header length, the header as JSON (name -> dtype, shape, byte
range in the data that follows), the data. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.errors import InputError

MAX_HEADER = 100_000_000  # the limit of the format's own reader
_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: where it lies and what it is.

    Attributes:
        file: the file that holds it.
        dtype: name in the format, such as 'BF16'.
        shape: sizes.
        start, stop: byte range in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file, in file order of the header.

    Raises:
        InputError: not a safetensors file, truncated, or a header that contradicts the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise InputError(f"{path} is truncated: it has {size} bytes; fetch it again")
            if length > MAX_HEADER or length > size - 8:
                raise InputError(
                    f"{path} is truncated or not a safetensors file: its header claims {length} "
                    f"bytes and the file has {size}; fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} has a corrupt safetensors header ({_short(error)}); fetch it again"
        ) from None
    if not isinstance(header, dict):
        raise InputError(f"{path} has a corrupt safetensors header (no mapping); fetch it again")
    header.pop("__metadata__", None)
    return _checked(path, header, 8 + length, size)


def _checked(
    path: Path, header: Mapping[str, Any], offset: int, size: int
) -> dict[str, TensorInfo]:
    out = {}
    for name, entry in header.items():
        try:
            dtype = str(entry["dtype"])
            shape = tuple(int(n) for n in entry["shape"])
            start, stop = (offset + int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: the header entry of tensor '{name}' is corrupt; fetch the file again"
            ) from None
        if dtype not in _BYTES:
            raise InputError(
                f"{path}: tensor '{name}' has the dtype '{dtype}', which is not supported; "
                "convert it to float32, float16 or bfloat16 first"
            )
        if stop > size:
            raise InputError(
                f"{path} is truncated: tensor '{name}' should end at byte {stop} and the file has "
                f"{size}; fetch it again"
            )
        wanted = math.prod(shape) * _BYTES[dtype]
        if min((*shape, 0)) < 0 or start < offset or stop - start != wanted:
            raise InputError(
                f"{path}: tensor '{name}' of shape {list(shape)} and dtype {dtype} needs {wanted} "
                f"bytes but has {stop - start}; the header is corrupt, fetch the file again"
            )
        out[name] = TensorInfo(path, dtype, shape, start, stop)
    end = offset
    for name, info in sorted(out.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start < end:
            raise InputError(f"{path}: tensor '{name}' overlaps another one; fetch the file again")
        end = info.stop
    return out


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a tensor name occurs twice")
    return out


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]
