"""Models with the graph of a checkpoint and almost none of its weights.

They answer questions about the graph. Large weights are zeros whose memory the system would give
when they are written, which nobody does. Small tensors (biases, norms, tables of positions that a
mask may be made from) are read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rewriter.checkpoint import architecture
from rewriter.checkpoint.headers import TensorInfo
from rewriter.checkpoint.weights import Weights

LARGE = 1 << 20
"""Bytes from which on a tensor is left in its file."""


def untouched(like: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and dtype of `like` that take no memory until they are written."""
    kind = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[like.element_size()]
    return torch.from_numpy(np.zeros(tuple(like.shape), kind)).view(like.dtype)


def of_files(
    config: PreTrainedConfig, where: Path, dtype: torch.dtype | None, found: Weights
) -> PreTrainedModel | None:
    """The skeleton of a safetensors checkpoint.

    None where the headers alone do not show that the files hold every weight under its own name;
    then the model itself has to be loaded.

    Raises:
        InputError: the config does not describe a model.
    """
    if found.kind != "safetensors":
        return None
    model = architecture.build(config, where, dtype)
    places = _places(model, found)
    if places is None:
        return None
    small: dict[Path, list[tuple[torch.Tensor, str]]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for key, (name, info) in places.items():
        tensor = tensors[key]
        if info.stop - info.start >= LARGE and isinstance(tensor, nn.Parameter):
            tensor.data = untouched(tensor)
        else:
            small.setdefault(info.file, []).append((tensor, name))
    for file, wanted in small.items():
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            for tensor, name in wanted:
                tensor.copy_(opened.get_tensor(name))
    return model


def _places(model: PreTrainedModel, found: Weights) -> dict[str, tuple[str, TensorInfo]] | None:
    """Stored name and place of each tensor of a model, or None unless they match one to one."""
    prefix = f"{model.base_model_prefix}."
    own = model.state_dict()
    out: dict[str, tuple[str, TensorInfo]] = {}
    for name, info in found.tensors.items():
        candidates = (name, prefix + name, name.removeprefix(prefix))
        key = next((c for c in candidates if c in own), None)
        if key is None or key in out or tuple(own[key].shape) != info.shape:
            return None
        out[key] = name, info
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return out if set(own) - tied <= set(out) else None
