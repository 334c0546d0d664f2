"""Low-rank updates of the projections around rewritten cores, through peft."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rewriter.distill.config import LogitStage
from rewriter.distill.copies import rewritten_owners
from rewriter.errors import UsageError


def site_projections(student: nn.Module) -> list[str]:
    """Paths of the projection modules of all rewritten sites, in order, each once."""
    modules = dict(student.named_modules())
    paths: list[str] = []
    owners = rewritten_owners(student)
    for owner, core in ((path, c) for path, cores in owners.items() for c in cores.values()):
        for projection in (core.site.projections or {}).values():
            inside = f"{owner}.{projection.module}" if owner else projection.module
            path = projection.module if projection.module in modules else inside
            if path in modules and path not in paths:
                paths.append(path)
    return paths


def inject_lora(student: nn.Module, options: LogitStage, seed: int) -> dict[str, Any]:
    """Put low-rank updates (float32, starting at zero) on the sites' projections, in place.

    Returns:
        The adapted layers by path.

    Raises:
        UsageError: peft is not installed, or no projection was identified.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            "Training with train 'lora' needs the package 'peft': install attention-rewriter[lora] "
            "or choose train 'core' or 'all'."
        ) from error
    paths = site_projections(student)
    if not paths:
        raise UsageError(
            "No projection of a rewritten site was identified, so there is nothing to put low-rank "
            "updates on: choose train 'core' or 'all'."
        )
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0,
        target_modules="|".join(re.escape(path) for path in paths),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, student)
    for name, module in list(student.named_modules()):
        if ".lora_" in name and isinstance(module, nn.Linear):
            module.__class__ = _InDtypeOfInput
            module.weight.data = module.weight.data.float()
    layers = {path: student.get_submodule(path) for path in paths}
    for layer in layers.values():
        layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return layers


class _InDtypeOfInput(nn.Linear):
    """Float32 weights that are multiplied in the dtype of the model, as under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))
