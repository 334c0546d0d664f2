"""Opening a checkpoint: what is there is checked at once, and loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rewriter.checkpoint import architecture, gguf, skeleton, weights
from rewriter.checkpoint.quiet import quiet, reason
from rewriter.errors import InputError, UsageError

Kind = Literal["directory", "file", "gguf", "rewritten"]
DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_FILES = (*_VOCABULARIES, "tekken.json", "sentencepiece.bpe.model", "spm.model")


class Source:
    """A checkpoint on disk: its config, tokenizer and model, each loaded on first use.

    Attributes:
        path: the directory or file.
        kind: directory (Hugging Face), file (one safetensors file), gguf, rewritten (our own).
        dtype: dtype of the weights in memory; None keeps them as stored.
        drop_extra: leave out stored tensors that the architecture has no place for.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        dtype: torch.dtype | None,
        config_path: Path | None,
        found: weights.Weights | None,
        drop_extra: bool,
    ):
        self.path = path
        self.kind = kind
        self.dtype = dtype
        self.drop_extra = drop_extra
        self._config_path = config_path
        self._weights = found
        self._opened: gguf.Opened = {}

    @property
    def name(self) -> str:
        """A short name for tables: the last part of the path without a suffix."""
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def has_tokenizer(self) -> bool:
        folder = self.path if self.path.is_dir() else self.path.parent
        return self.kind == "gguf" or any((folder / n).is_file() for n in _TOKENIZER_FILES)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Raises InputError if it is damaged or of an unknown architecture."""
        if self.kind == "gguf":
            return gguf.read_config(self.path, self._opened)
        assert self._config_path is not None
        if self.kind == "rewritten":
            from rewriter.checkpoint.load import base_config  # reading knows nothing of rewriting

            return base_config(self.path)
        return architecture.read_config(self._config_path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises InputError if the checkpoint has none."""
        if self.kind == "gguf":
            return gguf.read_tokenizer(self.path)
        folder = self.path if self.path.is_dir() else self.path.parent
        if not self.has_tokenizer:
            raise InputError(
                f"there is no tokenizer in {folder} (such as tokenizer.json); copy the model's "
                "tokenizer files there"
            )
        try:
            with quiet():
                return AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # tokenizer files fail in many ways
            raise InputError(
                f"the tokenizer in {folder} cannot be loaded: {reason(error)}"
            ) from None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in eval mode, every parameter from the checkpoint.

        Raises:
            InputError: tensors are missing, left over or of another shape; the first are named.
        """
        if self.kind == "rewritten":
            from rewriter.checkpoint.load import load

            model = load(self.path, self.dtype)
            assert isinstance(model, PreTrainedModel)
            return model
        if self.kind == "gguf":
            model, info = gguf.read_model(self.path, self.config, self.dtype, self._opened)
            self._opened.clear()
        else:
            model, info = self._load_weights()
        _check_complete(self.path, model, info, self.drop_extra)
        model.config.name_or_path = str(self.path)
        return model.eval()

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """A model with the graph of `model`, for questions that no weight decides.

        It holds zeros that take no memory, after names and sizes of the stored tensors were
        checked: de-quantising takes longer than reading a graph, and a model may be larger than
        memory. Where they do not match one to one it is the model. Raises InputError as `model`.
        """
        made: PreTrainedModel | None = None
        if self.kind == "gguf":
            made = gguf.read_skeleton(self.path, self.config, self.dtype, self._opened)
        elif self._weights is not None and self._config_path is not None:
            dtype = self.dtype or self._weights.stored_dtype
            made = skeleton.of_files(self.config, self._config_path, dtype, self._weights)
        if made is None:
            return self.model
        made.config.name_or_path = str(self.path)
        return made.eval()

    @property
    def mapped_files(self) -> tuple[Path, ...]:
        """The files that the weights of `model` stay in, mapped; none if they are converted."""
        found = self._weights
        if found is None or self.dtype not in (None, found.stored_dtype):
            return ()
        return found.files

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files (of a GGUF file: before they are de-quantised)."""
        files = (self.path,) if self._weights is None else self._weights.files
        return sum(file.stat().st_size for file in files)

    def _load_weights(self) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        assert self._weights is not None
        assert self._config_path is not None
        cls = architecture.model_class(self.config, self._config_path)
        _check_shapes(architecture.build(self.config, self._config_path, meta=True), self._weights)
        state = self._weights.load()
        stored = self._weights.stored_dtype or _main_dtype(state.values())
        try:
            with quiet():
                # a state dict instead of the path: only the files checked above are ever opened
                model, info = cls.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=state,
                    dtype=self.dtype or stored,
                    ignore_mismatched_sizes=True,  # reported with names below
                    output_loading_info=True,
                )
        except Exception as error:
            raise InputError(
                f"cannot load {self.path} as a {cls.__name__}: {reason(error)}"
            ) from None
        if model.can_generate():
            _read_generation_config(model, self._config_path.parent)
        return model, info


def open_checkpoint(
    path: str | Path,
    *,
    config: str | Path | None = None,
    dtype: str | torch.dtype | None = "auto",
    drop_extra: bool = False,
) -> Source:
    """Look at a checkpoint and check its files without loading a tensor.

    Args:
        path: a Hugging Face directory, a .safetensors file, a .gguf file (or a directory with
            exactly one), or a directory that `save` wrote.
        config: the config.json of a single safetensors file, if it is not beside it.
        dtype: 'auto' (as stored), 'float32', 'bfloat16', 'float16' or a torch dtype.
        drop_extra: leave out stored tensors that the architecture has no place for; refused
            otherwise.

    Raises:
        InputError: nothing there, not a checkpoint, or damaged files; with the file's name.
        UsageError: an unknown dtype.
    """
    path = Path(path)
    kept = torch_dtype(dtype)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a model directory or weight file")
    if path.is_file():
        return _open_file(path, config, kept, drop_extra)
    if not any(path.iterdir()):
        raise InputError(f"{path} is empty; give a model directory")
    config_path = path / "config.json"
    if not config_path.exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _open_file(found[0], None, kept, drop_extra)
        if found:
            raise InputError(f"{path} holds {len(found)} GGUF files; name one, such as {found[0]}")
        if (path / "adapter_config.json").exists():
            raise InputError(f"{path} is an adapter; merge it into its base model first")
    data = architecture.read_json(config_path)
    if data.get("model_type") == architecture.REWRITTEN_TYPE:
        return Source(path, "rewritten", kept, config_path, None, drop_extra)
    architecture.check_model_type(data, config_path)
    return Source(path, "directory", kept, config_path, weights.find_weights(path), drop_extra)


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a name stands for; None means as stored. Raises UsageError."""
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise UsageError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"{dtype} is not a floating dtype; choose one of {', '.join(DTYPES)}")
    return dtype


def _open_file(
    path: Path, config: str | Path | None, dtype: torch.dtype | None, drop_extra: bool
) -> Source:
    if path.suffix == ".gguf":
        gguf.check(path)
        return Source(path, "gguf", dtype, None, None, drop_extra)
    if path.suffix == ".safetensors":
        found = weights.single_file(path)
        config_path = Path(config) if config is not None else path.parent / "config.json"
        if not config_path.exists():
            raise InputError(
                f"{path} needs its config: there is no {config_path}; put it there or pass config="
            )
        return Source(path, "file", dtype, config_path, found, drop_extra)
    raise InputError(
        f"{path} is not a checkpoint; give a model directory, a .safetensors or a .gguf file"
    )


def _check_shapes(expected: PreTrainedModel, found: weights.Weights) -> None:
    """Compare header shapes with the architecture; renamed tensors are left to the loader."""
    prefix = f"{expected.base_model_prefix}."
    wanted = {name: tuple(t.shape) for name, t in expected.state_dict().items()}
    for name, info in found.tensors.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in wanted and wanted[candidate] != info.shape:
                raise InputError(
                    f"{info.file}: tensor '{name}' has the shape {list(info.shape)}, but the "
                    f"config describes {list(wanted[candidate])}; config and weights do not belong "
                    "together"
                )
            if candidate in wanted:
                break


def _check_complete(
    path: Path, model: PreTrainedModel, info: Mapping[str, Any], drop_extra: bool
) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(info["missing_keys"]) - tied)
    name = type(model).__name__
    if missing:
        raise InputError(
            f"{path} lacks {_some(missing)} that {name} needs; nothing is filled in at random, so "
            "complete the checkpoint or correct 'architectures' in its config"
        )
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"{path}: tensor '{key}' has the shape {list(stored)}, but the config describes "
            f"{list(wanted)}; config and weights do not belong together"
        )
    extra = sorted(info["unexpected_keys"])
    if extra and not drop_extra:
        raise InputError(
            f"{path} holds {_some(extra)} for which {name} has no place; correct 'architectures' "
            "in its config, or ask to drop them (drop_extra=True)"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {shown}{more}"


def _main_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    except Exception as error:
        raise InputError(f"{path} cannot be used: {reason(error)}; correct or remove it") from None
