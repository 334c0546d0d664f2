"""The usual set of metrics of a causal language model in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter.errors import UsageError
from rewriter.evaluate.ablation import branch_ablation
from rewriter.evaluate.measurement import Measurement
from rewriter.evaluate.quality import copy_perplexity, passkey, perplexity, teacher_gap
from rewriter.evaluate.recall import lists, recall
from rewriter.evaluate.speed import speed

METRICS = ("perplexity", "copy", "passkey", "teacher", "recall", "lists", "speed")
USUAL = METRICS[:4]


@dataclass(frozen=True)
class SuiteOptions:
    """How much to measure.

    Attributes:
        metrics: any of 'perplexity', 'copy', 'passkey', 'teacher' (KL and top-1 agreement),
            'recall' (associative recall), 'lists' (nested lists), 'speed' (times and cache).
        rows: token rows used for perplexity and the teacher gap.
        second_half: score perplexity on the second half of each row only.
        copy_samples, copy_passage, copy_gap: see `copy_perplexity`.
        passkey_lengths, passkey_samples: see `passkey`.
        recall_pairs, recall_samples: see `recall`.
        list_lengths, list_samples: see `lists`.
        speed_lengths: see `speed`.
        batch: rows of one forward.
        seed: of the samples.
    """

    metrics: tuple[str, ...] = USUAL
    rows: int = 4
    second_half: bool = True
    copy_samples: int = 6
    copy_passage: int = 200
    copy_gap: int = 700
    passkey_lengths: tuple[int, ...] = (256, 512, 1024)
    passkey_samples: int = 2
    recall_pairs: tuple[int, ...] = (16, 64, 256)
    recall_samples: int = 4
    list_lengths: tuple[int, ...] = (256, 512)
    list_samples: int = 8
    speed_lengths: tuple[int, ...] = (512, 2048)
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"There is no metric '{name}': choose among {', '.join(METRICS)}.")


def measure(
    model: nn.Module,
    tokenizer: Any,
    rows: torch.Tensor,
    *,
    teacher: nn.Module | None = None,
    options: SuiteOptions | None = None,
) -> dict[str, Measurement]:
    """Measure one model.

    Args:
        rows: (rows, N) int64 held-out token rows; copy perplexity takes its passages from them.
        teacher: for KL and top-1 agreement, which are left out without it.
    """
    chosen = options or SuiteOptions()
    used = rows[: chosen.rows]
    out: list[Measurement] = []
    if "perplexity" in chosen.metrics:
        start = rows.shape[1] // 2 if chosen.second_half else 1
        out.append(perplexity(model, used, batch=chosen.batch, start=start))
    if "copy" in chosen.metrics:
        out.append(
            copy_perplexity(
                model,
                rows.flatten(),
                samples=chosen.copy_samples,
                passage=chosen.copy_passage,
                gap=chosen.copy_gap,
                seed=chosen.seed,
                batch=chosen.batch,
            )
        )
    if "passkey" in chosen.metrics:
        out.append(
            passkey(
                model,
                tokenizer,
                lengths=chosen.passkey_lengths,
                samples=chosen.passkey_samples,
                seed=chosen.seed,
            )
        )
    if "teacher" in chosen.metrics and teacher is not None:
        gap = teacher_gap(model, teacher, used, batch=chosen.batch)
        out += [gap.kl, gap.top1]
    out += _probes(model, tokenizer, rows, chosen)
    return {measured.name: measured for measured in out}


def _probes(
    model: nn.Module, tokenizer: Any, rows: torch.Tensor, chosen: SuiteOptions
) -> list[Measurement]:
    out: list[Measurement] = []
    if "recall" in chosen.metrics:
        pairs, samples = chosen.recall_pairs, chosen.recall_samples
        stream = rows.flatten()
        out.append(recall(model, stream, pairs=pairs, samples=samples, seed=chosen.seed))
    if "lists" in chosen.metrics:
        lengths, samples = chosen.list_lengths, chosen.list_samples
        out.append(lists(model, tokenizer, lengths=lengths, samples=samples, seed=chosen.seed))
    if "speed" in chosen.metrics:
        known = int(rows.max()) + 1  # times do not depend on which tokens
        out += speed(model, known, lengths=chosen.speed_lengths)
    return out


def measure_branches(
    model: nn.Module,
    tokenizer: Any,
    rows: torch.Tensor,
    *,
    options: SuiteOptions | None = None,
    whole: dict[str, Measurement] | None = None,
) -> dict[str, dict[str, Measurement]]:
    """`measure` with each branch of the mixers switched off model-wide.

    Args:
        whole: measurements of the same model with nothing switched off, if they exist already.
    """
    return branch_ablation(
        model, lambda m: measure(m, tokenizer, rows, options=options), whole or None
    )
