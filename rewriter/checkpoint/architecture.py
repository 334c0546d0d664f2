"""From a config to the class that computes it, and to an instance without any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rewriter.checkpoint.quiet import quiet, reason
from rewriter.errors import InputError

REWRITTEN_TYPE = "attention_rewriter"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"there is no {path.name} in {path.parent}; is this a model directory?"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({reason(error)}); restore the file") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object; restore the file")
    return data


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint from its config.json.

    Raises:
        InputError: not a config, an architecture this transformers does not know, or quantised.
    """
    data = read_json(path)
    check_model_type(data, path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # config classes raise whatever their validation raises
        raise InputError(f"{path} is not a usable config: {reason(error)}") from None
    check_quantisation(config, path)
    return config


def config_from_dict(data: Mapping[str, Any], where: Path) -> PreTrainedConfig:
    """The config from its values; raises InputError as `read_config`, naming `where`."""
    check_model_type(data, where)
    try:
        with quiet():
            config = CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    except Exception as error:
        raise InputError(f"{where} is not a usable config: {reason(error)}") from None
    check_quantisation(config, where)
    return config


def check_model_type(data: Mapping[str, Any], where: Path) -> None:
    kind = data.get("model_type")
    if kind is None:
        raise InputError(f"{where} names no 'model_type', so the architecture is not known; add it")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in data:
        raise InputError(
            f"{where}: the model type '{kind}' needs code that comes with the checkpoint, and such "
            "code is never run; load the model yourself and pass it to rewrite()"
        )
    raise InputError(
        f"{where}: transformers {transformers.__version__} does not know the model type '{kind}'; "
        "upgrade transformers or correct the file"
    )


def check_quantisation(config: PreTrainedConfig, where: Path) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    if isinstance(quantisation, Mapping):
        method = quantisation.get("quant_method")
    else:
        method = getattr(quantisation, "quant_method", None)
    raise InputError(
        f"{where}: the weights are quantised ({method or 'unknown method'}), which is not "
        "supported; start from the unquantised checkpoint"
    )


def model_class(config: PreTrainedConfig, where: Path) -> type[PreTrainedModel]:
    """The class that `architectures` of the config names, found through the auto classes.

    Raises:
        InputError: no class is named, or none of that name fits the model type.
    """
    names = getattr(config, "architectures", None) or []
    if not names:
        raise InputError(
            f"{where} names no 'architectures', so it is not known which head the weights have; "
            'add it, such as "architectures": ["...ForCausalLM"]'
        )
    name = names[0]
    for auto in _auto_classes():
        for cls in _classes_of(auto, config):
            if cls.__name__ == name:
                return cls
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        own: type[PreTrainedModel] = found
        if own.config_class is not None and isinstance(config, own.config_class):
            return own
    raise InputError(
        f"{where}: transformers {transformers.__version__} has no class '{name}' for the model "
        f"type '{config.model_type}'; correct 'architectures'"
    )


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model of a config that names no architecture (GGUF files)."""
    classes = _classes_of(transformers.AutoModelForCausalLM, config)
    return classes[0] if classes else None


def build(
    config: PreTrainedConfig, where: Path, dtype: torch.dtype | None = None, meta: bool = False
) -> PreTrainedModel:
    """An instance whose parameters are not initialised; buffers are (unless `meta`).

    Args:
        config: names the architecture.
        where: file named in errors.
        dtype: default dtype while building; None takes the config's.
        meta: no memory at all, for names and shapes only.

    Raises:
        InputError: the config does not describe a model.
    """
    cls = model_class(config, where)
    try:
        with quiet(), no_init_weights(), torch.device("meta" if meta else "cpu"):
            model: PreTrainedModel = cls._from_config(
                config, dtype=dtype if dtype is not None else config.dtype or torch.float32
            )
    except Exception as error:
        raise InputError(
            f"{where} does not describe a working {cls.__name__}: {reason(error)}"
        ) from None
    if not meta:
        model.tie_weights()
    return model.eval()


def _auto_classes() -> list[Any]:
    """All auto classes of transformers, the plain AutoModel last."""
    found = [
        value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel") and hasattr(value, "_model_mapping")
    ]
    return sorted(found, key=lambda auto: auto.__name__ == "AutoModel")


def _classes_of(auto: Any, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    mapping = auto._model_mapping
    if mapping is None or type(config) not in mapping:
        return []
    value = mapping[type(config)]
    return list(value) if isinstance(value, list | tuple) else [value]
