"""Saving a rewritten model as a directory that loads here and fails loudly everywhere else.

The weight files have names that no other loader looks for and `model_type` is our own: a loader
that does not know about the rewrite would otherwise rebuild softmax attention without a word.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rewriter import atomic
from rewriter.checkpoint.architecture import REWRITTEN_TYPE
from rewriter.checkpoint.keys import new_keys
from rewriter.checkpoint.manifest import MANIFEST, Manifest, WeightFile, sha256_of
from rewriter.checkpoint.quiet import quiet
from rewriter.errors import OutputError, UsageError
from rewriter.plan import Plan

INDEX = "rewritten.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 2**30
_ROOM = 1 << 20  # for everything that is not weights


@dataclass(frozen=True)
class Contents:
    """Tensors to store, each once, and the keys that are other names of a stored one."""

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]

    @property
    def bytes(self) -> int:
        return sum(_bytes(tensor) for tensor in self.tensors.values())


def save(
    model: nn.Module,
    path: str | Path,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    after_shard: Callable[[], object] | None = None,
) -> Path:
    """Write the model, its plan and its tokenizer; all of it or nothing.

    Args:
        model: a rewritten model; one with a transformers config can be loaded again by itself,
            any other needs `load(base=...)`.
        path: directory to make.
        plan: what was done to the model.
        tokenizer: saved along.
        overwrite: replace an existing checkpoint at `path`.
        max_shard_bytes: largest weight file.
        after_shard: called after each weight file, to free what it took.

    Returns:
        The directory.

    Raises:
        OutputError: the target exists, is not writable, or the disk is full; nothing is left.
        UsageError: the state dict holds something that is no tensor.
    """
    target = Path(path)
    contents = collect(model)
    with atomic.directory(target, overwrite, contents.bytes + _ROOM) as partial:
        try:
            files = _write_weights(contents, partial, max_shard_bytes, after_shard)
        except SafetensorError as error:
            raise _write_error(target, error) from error
        manifest = Manifest(
            base_architecture=_base_name(model),
            original=_original_name(model),
            dtype=str(_build_dtype(model)).removeprefix("torch."),
            attention=_attention(model),
            buffer_dtypes=_buffer_dtypes(model),
            plan=plan,
            new_keys=new_keys(model),
            aliases=dict(contents.aliases),
            weights=files,
        )
        content = manifest.to_bytes()
        (partial / MANIFEST).write_bytes(content)
        config = _config(model, hashlib.sha256(content).hexdigest())
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        with quiet():
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    return target


def collect(model: nn.Module) -> Contents:
    """The state dict with tied and aliased tensors reduced to one each.

    Raises:
        UsageError: an entry is no tensor, or has no data (meta).
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"'{key}' of the model is a {type(value).__name__}; only tensors save")
        if value.is_meta:
            raise UsageError(f"'{key}' of the model has no data (meta device); load weights first")
        place = (
            value.untyped_storage().data_ptr(),
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
            value.device,
        )
        if value.numel() and place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            tensors[key] = value.detach()
    return Contents(tensors, aliases)


def shards(contents: Contents, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Split in order; a shard exceeds `limit` bytes only if one tensor alone does."""
    current: dict[str, torch.Tensor] = {}
    size = 0
    for key, tensor in contents.tensors.items():
        if current and size + _bytes(tensor) > limit:
            yield current
            current, size = {}, 0
        current[key] = tensor
        size += _bytes(tensor)
    yield current


def _write_weights(
    contents: Contents, folder: Path, limit: int, after: Callable[[], object] | None
) -> list[WeightFile]:
    parts = list(shards(contents, limit))
    files, mapping = [], {}
    for number, part in enumerate(parts, start=1):
        name = f"rewritten-{number:05d}-of-{len(parts):05d}.safetensors"
        path = folder / name
        # clone what shares storage with other tensors: the format refuses overlaps
        plain = {key: tensor.to("cpu").contiguous() for key, tensor in part.items()}
        save_file(_separate(plain), path, metadata={"format": "pt"})
        files.append(WeightFile(name=name, bytes=path.stat().st_size, sha256=sha256_of(path)))
        mapping.update(dict.fromkeys(part, name))
        if after is not None:
            after()
    index = {"metadata": {"total_size": contents.bytes}, "weight_map": mapping}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views into one storage become tensors of their own (exact aliases are gone already)."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _config(model: nn.Module, manifest_sha256: str) -> dict[str, Any]:
    config = getattr(model, "config", None)
    base: dict[str, Any] | None = None
    if isinstance(config, PreTrainedConfig):
        base = json.loads(config.to_json_string(use_diff=False))
        base["architectures"] = [_base_name(model)]
        base["dtype"] = str(_build_dtype(model)).removeprefix("torch.")
        for name in ("quantization_config", "_name_or_path", "name_or_path"):
            base.pop(name, None)
    return {
        "model_type": REWRITTEN_TYPE,
        "rewriter": {
            "base_config": base,
            "manifest": MANIFEST,
            "manifest_sha256": manifest_sha256,
            "note": "attention was rewritten; load with rewriter.load(directory)",
        },
    }


def _base_name(model: nn.Module) -> str:
    return type(model).__name__


def _original_name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or "")
    return Path(name).name  # a path on someone's machine means nothing elsewhere


def _build_dtype(model: nn.Module) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _attention(model: nn.Module) -> str | None:
    """Spelling of the attention that was not rewritten; a config does not save it."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """Dtypes of the floating buffers that no state dict holds, such as rotary frequencies.

    They are rebuilt from the config in float32; a model cast as a whole has them rounded.
    """
    stored = model.state_dict().keys()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in stored and buffer.is_floating_point()
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_error(target: Path, error: SafetensorError) -> OutputError:
    """The writer reports system errors as text; give them their number back."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if f"os error {code}" in text or f"code: {code}," in text:
            return atomic.output_error(target, OSError(code, text))
    return OutputError(f"cannot write {target}: {' '.join(text.split())}")
