"""Contract 6: the keys of a rewritten model are those of the original, plus `core.*`.

Both state dicts list the original keys in the original order, so either loads into the other side.
A projection that became structured has `core.*` in the place of its weight; on the way back its
weight is the matrix that the structure stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

CORE = "core"


def core_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Key prefixes of all mixers in the model, each with its final dot."""
    from rewriter.mixers.base import Mixer  # mixers are heavier than reading a checkpoint
    from rewriter.mixers.channel.base import Structure

    return tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Mixer | Structure) and name.rpartition(".")[2] == CORE
    )


def new_keys(model: nn.Module) -> list[str]:
    """Keys that the rewrite added, in state-dict order."""
    prefixes = core_prefixes(model)
    return [key for key in model.state_dict() if key.startswith(prefixes)] if prefixes else []


def reverse_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a rewritten model as the original model expects it: without its mixers."""
    prefixes = core_prefixes(model)
    weights = projection_weights(model)
    out: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if not (prefixes and key.startswith(prefixes)):
            out[key] = value
        elif (name := key.rpartition(".core.")[0]) in weights:
            # the weight comes before the bias, as it does in the module that was replaced
            weight, bias = weights.pop(name), out.pop(f"{name}.bias", None)
            out[f"{name}.weight"] = weight
            if bias is not None:
                out[f"{name}.bias"] = bias
    return out


def projection_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Dense weights of all structured projections, by module path."""
    from rewriter.mixers.channel.base import Projection

    return {
        name: module.weight.detach()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Projection)
    }


def forward_state_dict(
    original: Mapping[str, torch.Tensor], model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """State dict of the original model as the rewritten `model` expects it.

    Original keys are unchanged and in order; with a `model`, its mixers' own current values are
    put where the model lists them, so that the result loads strictly.

    Raises:
        KeyError: the model has a key that is neither original nor a mixer's.
    """
    if model is None:
        return dict(original)
    prefixes = core_prefixes(model)
    out: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        out[key] = value if prefixes and key.startswith(prefixes) else original[key]
    return out
