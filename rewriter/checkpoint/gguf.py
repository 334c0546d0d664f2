"""GGUF files, read through transformers and de-quantised. Needs the `gguf` extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.initialization import no_init_weights

from rewriter.checkpoint.architecture import causal_lm_class
from rewriter.checkpoint.gguf_header import scan
from rewriter.checkpoint.gguf_speed import quick_reading
from rewriter.checkpoint.quiet import quiet, reason
from rewriter.checkpoint.skeleton import untouched
from rewriter.errors import InputError

MAGIC = b"GGUF"


def check(path: Path) -> None:
    """Is this a complete GGUF file, and can it be read here?

    Raises:
        InputError: the extra is not installed, or the file is truncated, corrupt or no GGUF file.
    """
    missing = [n for n in ("gguf", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise InputError(
            f"reading {path} needs {' and '.join(missing)}: pip install attention-rewriter[gguf]"
        )
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if head != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    from gguf.constants import GGML_QUANT_SIZES  # an optional dependency

    scan(path, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})


Opened = dict[Path, Any]
"""Readers of files that are open; one dict for all calls about one checkpoint."""


def read_config(path: Path, opened: Opened | None = None) -> PreTrainedConfig:
    """The config in the file's metadata. Raises InputError if its architecture is not supported."""
    return _guarded(path, "config", AutoConfig, opened)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in the file's metadata. Raises InputError if there is none."""
    return _guarded(path, "tokenizer", AutoTokenizer)


def read_model(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype | None, opened: Opened | None = None
) -> tuple[Any, Any]:
    """The de-quantised model and transformers' record of what was loaded.

    Raises:
        InputError: the architecture is not supported or the tensors do not fit it.
    """
    cls: type[PreTrainedModel] | None = causal_lm_class(config)
    if cls is None:
        raise InputError(
            f"{path}: the architecture '{config.model_type}' is no causal language model, and no "
            "other is read from GGUF; start from its Hugging Face checkpoint"
        )
    try:
        with quiet(), quick_reading({} if opened is None else opened):
            model, info = cls.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype if dtype is not None else "auto",
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(f"cannot load {path}: {reason(error)}") from None
    # The weights are plain tensors now; these two would make every later save refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.architectures = [type(model).__name__]
    return model, info


def read_skeleton(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype | None, opened: Opened | None = None
) -> PreTrainedModel | None:
    """The model with zeros that take no memory instead of its weights: for questions about a graph.

    None where it cannot be told from names and sizes alone that the file holds every weight; then
    the model itself has to be read.
    """
    cls: type[PreTrainedModel] | None = causal_lm_class(config)
    if cls is None:
        return None
    try:
        with quiet(), quick_reading({} if opened is None else opened), no_init_weights():
            model: PreTrainedModel = cls._from_config(config, dtype=dtype or torch.float32)
            model.tie_weights()
            complete = _complete(path, model)
    except Exception:  # reading the model itself will say what is wrong
        return None
    if not complete:
        return None
    for parameter in model.parameters():
        parameter.data = untouched(parameter)
    model.config.architectures = [cls.__name__]
    return model


def _complete(path: Path, model: PreTrainedModel) -> bool:
    """Whether the file has a tensor of the right size for every weight, by transformers' names."""
    import gguf  # an optional dependency

    reader = gguf.GGUFReader(path)
    sizes = {t.name: int(t.n_elements) for t in reader.tensors}
    kind = modeling_gguf_pytorch_utils.read_field(reader, "general.architecture")[0]
    processors = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS
    processor = processors.get(kind, modeling_gguf_pytorch_utils.TensorProcessor)(config={})
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)
    stored = {name: sizes[key] for key, name in names.items() if key in sizes}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    wanted = {n: p.numel() for n, p in model.named_parameters() if n not in tied}
    return all(stored.get(name) == size for name, size in wanted.items())


def _guarded(path: Path, what: str, auto: Any, opened: Opened | None = None) -> Any:
    try:
        with quiet(), quick_reading({} if opened is None else opened):
            return auto.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise InputError(f"cannot read the {what} in {path}: {reason(error)}") from None
