"""Encoders: do sentence similarities survive a rewrite?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rewriter.errors import InputError, UsageError
from rewriter.evaluate.measurement import LEVEL, Measurement
from rewriter.evaluate.scoring import evaluating
from rewriter.evaluate.sentences import SENTENCES

Array = npt.NDArray[np.float64]
RESAMPLES = 400


def embed(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str] = SENTENCES, *, batch: int = 16
) -> Array:
    """(sentences, width) mean of the last hidden states over the tokens that are not padding."""
    rows: list[Array] = []
    with evaluating(model):
        for start in range(0, len(sentences), batch):
            part = list(sentences[start : start + batch])
            coded = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            device = next(model.parameters()).device
            output = model(**{key: value.to(device) for key, value in coded.items()})
            hidden = getattr(output, "last_hidden_state", None)
            if not isinstance(hidden, torch.Tensor):
                raise UsageError(
                    "The model returns no last_hidden_state: sentence similarities need an encoder."
                )
            mask = coded["attention_mask"].to(device)[..., None].double()
            pooled = (hidden.double() * mask).sum(1) / mask.sum(1).clamp_min(1)
            rows.append(pooled.cpu().numpy())
    return np.concatenate(rows)


def cosines(embeddings: Array) -> Array:
    """(n, n) cosine similarities of (n, width) embeddings."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    out: Array = unit @ unit.T
    return out


def pearson(a: Array, b: Array) -> float:
    """Linear correlation of two vectors; NaN if one is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Correlation of ranks, ties sharing their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: Array = (last - (counts - 1) / 2.0).astype(np.float64)
    return middle[inverse.ravel()]


@dataclass(frozen=True)
class SimilarityAgreement:
    """Correlation of all pairwise sentence similarities before and after, 1.0 if unchanged."""

    pearson: Measurement
    spearman: Measurement


def similarity_agreement(before: Array, after: Array) -> SimilarityAgreement:
    """Compare the pairwise cosine similarities of two sets of embeddings of the same sentences.

    The interval resamples sentences, since pairs that share a sentence are not independent.

    Args:
        before, after: (n, width) embeddings; the widths may differ.

    Raises:
        InputError: fewer than three sentences, or not the same number on both sides.
    """
    n = before.shape[0]
    if n < 3 or after.shape[0] != n:
        raise InputError(
            f"Similarities need at least 3 sentences, the same before and after; got {n} and "
            f"{after.shape[0]}."
        )
    first, second = cosines(before), cosines(after)
    i, j = np.triu_indices(n, 1)
    rng = np.random.default_rng(0)
    draws: list[tuple[float, float]] = []
    for _ in range(RESAMPLES):
        picked = rng.integers(0, n, size=n)
        a, b = np.take(picked, i), np.take(picked, j)
        apart = a != b  # a sentence paired with itself says nothing
        if apart.sum() > 2:
            x, y = first[a[apart], b[apart]], second[a[apart], b[apart]]
            draws.append((pearson(x, y), spearman(x, y)))
    spread = np.asarray(draws)
    values = (pearson(first[i, j], second[i, j]), spearman(first[i, j], second[i, j]))
    low, high = np.nanquantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    made = [
        Measurement(
            name=f"similarity correlation ({name})",
            value=values[k],
            low=float(low[k]),
            high=float(high[k]),
            samples=n,
            tokens=len(i),
            better="high",
        )
        for k, name in enumerate(("Pearson", "Spearman"))
    ]
    return SimilarityAgreement(made[0], made[1])
