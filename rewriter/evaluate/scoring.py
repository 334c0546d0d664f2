"""Running a causal language model on token rows and scoring its predictions, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rewriter.errors import UsageError

CHUNK = 512  # predictions whose logits are held in float32 at once


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; every module gets its own mode back."""
    before = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, and inference mode."""
    with evaluation_mode(*models), torch.inference_mode():
        yield


def logits_of(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, N, V) logits of (B, N) tokens, without a cache.

    Raises:
        UsageError: the model has no such output.
    """
    inputs: dict[str, object] = {"input_ids": ids.to(_device(model))}
    if mask is not None:
        inputs["attention_mask"] = mask.to(_device(model))
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    output = model(**inputs)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise UsageError(
            "The model returns no (batch, tokens, vocabulary) logits: this metric needs a causal "
            "language model."
        )
    return logits


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of each next token: (B, N - 1) float64 of (B, N, V) logits."""
    flat = logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten().to(flat.device)
    parts = []
    for start in range(0, targets.numel(), CHUNK):
        part = flat[start : start + CHUNK].float().log_softmax(-1)
        parts.append(-part.gather(-1, targets[start : start + CHUNK, None]).squeeze(-1).double())
    return torch.cat(parts).reshape(ids.shape[0], -1).cpu()


def row_losses(model: nn.Module, rows: torch.Tensor, batch: int = 1) -> torch.Tensor:
    """(rows, N - 1) float64: the loss of predicting tokens 1 to N - 1 of each row."""
    parts = [
        token_losses(logits_of(model, rows[start : start + batch]), rows[start : start + batch])
        for start in range(0, rows.shape[0], batch)
    ]
    return torch.cat(parts)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
