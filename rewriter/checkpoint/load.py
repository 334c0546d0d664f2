"""Loading what `save` wrote: architecture from the config, layers from the plan, every weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from rewriter.checkpoint import architecture
from rewriter.checkpoint.guard import guard
from rewriter.checkpoint.manifest import MANIFEST, Manifest, check_weights
from rewriter.checkpoint.quiet import quiet, reason
from rewriter.checkpoint.read import torch_dtype
from rewriter.checkpoint.weights import load_safetensors
from rewriter.errors import InputError, RewriterError
from rewriter.plan import Plan

ApplyPlan = Callable[[nn.Module, Plan], nn.Module]


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = "auto",
    verify_hashes: bool = True,
    base: nn.Module | None = None,
    apply_plan: ApplyPlan | None = None,
) -> nn.Module:
    """Rebuild a rewritten model.

    The original architecture is built without initialising its weights, gets the stored ones, is
    rewritten by the stored plan, and the new layers get theirs. Every stored tensor must have a
    place and every place a stored tensor.

    Args:
        path: directory that `save` wrote.
        dtype: 'auto' keeps each tensor as stored; otherwise all floating tensors are cast.
        verify_hashes: compare manifest and weight files with the recorded sha256.
        base: the original model, for one that has no transformers config; changed in place.
        apply_plan: the function that rewrites, `rewriter.passes.realise.apply_plan` by default.

    Returns:
        The model in eval mode, of the class of the original; its `save_pretrained` is guarded.

    Raises:
        InputError: not such a directory, damaged, changed, or written by a newer version.
    """
    folder = Path(path)
    wanted = torch_dtype(dtype)
    config, pointer = _read_pointer(folder)
    manifest = Manifest.read(folder, pointer.get("manifest_sha256") if verify_hashes else None)
    files = check_weights(folder, manifest, verify_hashes)
    stored = _stored(files, manifest, wanted, folder)
    new = set(manifest.new_keys)
    model = base if base is not None else _build(folder, config, manifest, wanted)
    kept = {k: v for k, v in stored.items() if k not in new}
    assign(model, {**kept, **_replaced(model, kept, manifest.plan)}, manifest.aliases, folder)
    model = _rewrite(model, manifest.plan, apply_plan, folder)
    assign(model, stored, manifest.aliases, folder)
    if wanted is None:
        _cast_buffers(model, manifest.buffer_dtypes)
    _read_generation_config(model, folder)
    guard(model, manifest.plan)
    return model.eval()


def is_rewritten(path: str | Path) -> bool:
    """Is this a directory that `save` wrote?"""
    config = Path(path) / "config.json"
    try:
        data = architecture.read_json(config)
    except InputError:
        return False
    return data.get("model_type") == architecture.REWRITTEN_TYPE


def base_config(path: str | Path) -> PreTrainedConfig:
    """The config of the original model inside a rewritten checkpoint. Raises InputError."""
    folder = Path(path)
    config, _ = _read_pointer(folder)
    if config is None:
        raise InputError(f"{folder} was saved from a model without a transformers config")
    return architecture.config_from_dict(config, folder / "config.json")


def assign(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    folder: Path,
) -> None:
    """Put tensors into a model without copying; keys, shapes and ties have to match exactly.

    Raises:
        InputError: a missing or left-over key or another shape; the first is named.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in tensors]
    extra = [key for key in tensors if key not in own]
    if missing or extra:
        what = f"lacks '{missing[0]}'" if missing else f"holds '{extra[0]}' without a place for it"
        raise InputError(
            f"{folder} {what} ({len(missing)} missing, {len(extra)} left over); its weights and "
            f"its {MANIFEST} do not belong together"
        )
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            raise InputError(
                f"{folder}: '{key}' has the shape {list(tensors[key].shape)} and should have "
                f"{list(value.shape)}; its weights and its config do not belong together"
            )
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, key in aliases.items():  # assign made two parameters of a tied one
        if alias in parameters and key in parameters:
            owner, _, leaf = alias.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameters[key]


def _read_pointer(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a directory that was saved by this tool")
    data = architecture.read_json(folder / "config.json")
    pointer = data.get("rewriter")
    if data.get("model_type") != architecture.REWRITTEN_TYPE or not isinstance(pointer, dict):
        raise InputError(
            f"{folder} is not a rewritten checkpoint; open it as an ordinary one or convert it"
        )
    config = pointer.get("base_config")
    return (config if isinstance(config, dict) else None), pointer


def _build(
    folder: Path,
    config: Mapping[str, Any] | None,
    manifest: Manifest,
    dtype: torch.dtype | None,
) -> nn.Module:
    if config is None:
        raise InputError(
            f"{folder} was saved from a {manifest.base_architecture} without a transformers "
            "config; pass the original model as base="
        )
    where = folder / "config.json"
    built = architecture.config_from_dict(config, where)
    built.name_or_path = manifest.original or folder.name
    if manifest.attention in ("eager", "sdpa"):  # others need packages; the default is as good
        built._attn_implementation = manifest.attention
    model: nn.Module = architecture.build(built, where, dtype or torch_dtype(manifest.dtype))
    return model


def _stored(
    files: Iterable[Path], manifest: Manifest, dtype: torch.dtype | None, folder: Path
) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in files:
        for key, tensor in load_safetensors(file).items():
            convert = dtype is not None and tensor.is_floating_point()
            out[key] = tensor.to(dtype) if convert else tensor
    for alias, key in manifest.aliases.items():
        if key not in out:
            raise InputError(f"{folder} lacks '{key}', which '{alias}' is another name of")
        out[alias] = out[key]
    return out


def _cast_buffers(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    for name, buffer in list(model.named_buffers()):
        dtype = getattr(torch, dtypes.get(name, ""), None)
        if isinstance(dtype, torch.dtype) and dtype != buffer.dtype:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(dtype)


def _replaced(
    model: nn.Module, kept: Mapping[str, torch.Tensor], plan: Plan
) -> dict[str, torch.Tensor]:
    """Zeros without memory for weights that the plan replaces, which the checkpoint has not."""
    if not plan.mlps:
        return {}
    superseded = importlib.import_module("rewriter.passes.realise.channel").superseded
    names = set(superseded(plan.mlps)) - set(kept)
    return {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape)
        for key, value in model.state_dict().items()
        if key in names
    }


def _rewrite(model: nn.Module, plan: Plan, apply_plan: ApplyPlan | None, folder: Path) -> nn.Module:
    # imported late: capturing pulls in the whole compiler
    if apply_plan is None:
        apply_plan = cast(ApplyPlan, importlib.import_module("rewriter.passes.realise").apply_plan)
    try:
        return apply_plan(model, plan)
    except RewriterError as error:
        raise InputError(f"the plan in {folder / MANIFEST} cannot be replayed: {error}") from error


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists() or not hasattr(model, "generation_config"):
        return
    try:
        with quiet():
            loaded = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its validation raises
        raise InputError(f"{path} cannot be used: {reason(error)}; correct or remove it") from None
    model.generation_config = loaded
