"""Finding and reading weight files: safetensors first, old pickles only under `weights_only`."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from rewriter.checkpoint.architecture import read_json
from rewriter.checkpoint.headers import TensorInfo, read_header
from rewriter.checkpoint.quiet import reason
from rewriter.errors import InputError

_SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
_TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
_TORCH_DTYPE["BF16"] = torch.bfloat16


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        files: in reading order.
        kind: format of all of them.
        tensors: header entries by tensor name (safetensors only).
    """

    files: tuple[Path, ...]
    kind: Literal["safetensors", "pickle"]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The floating dtype that most bytes have, or None if the headers do not say."""
        count: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype in _TORCH_DTYPE:
                count[_TORCH_DTYPE[info.dtype]] += info.stop - info.start
        return count.most_common(1)[0][0] if count else None

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors, mapped from the files rather than copied where the format allows.

        Raises:
            InputError: a file is damaged, or a pickle needs more than plain tensors.
        """
        out: dict[str, torch.Tensor] = {}
        for file in self.files:
            part = load_safetensors(file) if self.kind == "safetensors" else load_pickle(file)
            out.update(part)
        return out


def find_weights(folder: Path) -> Weights:
    """The weights of a model directory; safetensors win over pickles.

    Raises:
        InputError: there are none, a shard is missing, or a header is damaged.
    """
    for kind, single in _SINGLE.items():
        index, whole = folder / f"{single}.index.json", folder / single
        if index.exists():
            return _weights(tuple(indexed(index)), kind, index)
        if whole.exists():
            return _weights((whole,), kind)
    raise InputError(
        f"there are no weights in {folder} (no model.safetensors, no pytorch_model.bin, no index "
        "of either); complete the download"
    )


def single_file(path: Path) -> Weights:
    """One safetensors file. Raises InputError if its header is damaged."""
    return _weights((path,), "safetensors")


def indexed(index: Path) -> list[Path]:
    """The shards that an index names, in order.

    Raises:
        InputError: the index is damaged, names files elsewhere, or a shard is missing.
    """
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{index} has no 'weight_map'; fetch it again")
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names the file '{name}' outside its directory; not read")
        if not (index.parent / name).is_file():
            first = next(tensor for tensor, file in mapping.items() if file == name)
            raise InputError(
                f"the shard {name} is missing in {index.parent} (it holds '{first}', says "
                f"{index.name}); complete the download"
            )
    return [index.parent / name for name in names]


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, memory-mapped. Raises InputError on damage."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}; fetch the file again") from None


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from an old torch file; nothing but tensors is ever unpickled.

    Raises:
        InputError: damaged, not a state dict, or it holds objects that would run code.
    """
    try:
        data = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise InputError(
                f"{path} is truncated or not a torch file ({reason(error, 80)}); fetch it again"
            ) from None
        raise InputError(
            f"{path} holds more than tensors and loading it could run code, so it is not read; "
            "convert it to safetensors in a place you trust"
        ) from None
    except Exception as error:  # damaged archives raise many kinds
        raise InputError(
            f"{path} is truncated or not a torch file ({reason(error, 80)}); fetch it again"
        ) from None
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise InputError(f"{path} holds no mapping of names to tensors, so it is no state dict")
    return {str(name): tensor for name, tensor in data.items()}


def _weights(files: tuple[Path, ...], kind: str, index: Path | None = None) -> Weights:
    if kind == "pickle":
        return Weights(files, "pickle")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise InputError(f"the tensor '{name}' is in {tensors[name].file.name} and {file}")
            tensors[name] = info
    if index is not None:
        for name, shard in read_json(index)["weight_map"].items():
            if name not in tensors or tensors[name].file.name != shard:
                raise InputError(
                    f"the tensor '{name}' is not in {index.parent / shard}, where {index.name} "
                    "says it is; complete the download"
                )
    return Weights(files, "safetensors", tensors)
