"""How much quality a rewrite costs: perplexity, two long-range probes, distance to the teacher.

Plain perplexity hardly notices that a model cannot look back: it is never reported alone. Copy
perplexity and the pass key ask for text that lies further back than a window reaches.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter.errors import InputError
from rewriter.evaluate.measurement import Measurement, pooled, proportion
from rewriter.evaluate.scoring import CHUNK, evaluating, logits_of, row_losses


def perplexity(
    model: nn.Module, rows: torch.Tensor, *, batch: int = 1, start: int = 1, buckets: int = 4
) -> Measurement:
    """exp of the mean loss over the tokens of each row from position `start` on.

    Args:
        rows: (rows, N) int64 token rows.
        start: first position that is scored; N // 2 leaves out tokens with little context.
        buckets: parts of the row whose perplexity is reported apart.
    """
    length = rows.shape[1]
    start = max(1, start)
    if rows.shape[0] == 0 or start >= length:
        raise InputError(
            f"Perplexity needs rows longer than {start} tokens; got {tuple(rows.shape)}."
        )
    with evaluating(model):
        losses = row_losses(model, rows, batch)[:, start - 1 :]
    width = losses.shape[1]
    edges = sorted({width * i // buckets for i in range(buckets + 1)})
    parts = {
        f"tokens {start + low}-{start + high - 1}": float(losses[:, low:high].mean().exp())
        for low, high in itertools.pairwise(edges)
    }
    units = [(float(row.sum()), float(width)) for row in losses]
    return pooled("perplexity", units, tokens=losses.numel(), transform="exp", parts=parts)


def copy_rows(
    stream: torch.Tensor, samples: int = 6, passage: int = 200, gap: int = 700, seed: int = 0
) -> torch.Tensor:
    """(samples, 2 * passage + gap): a passage, other text, the same passage again.

    Passage and gap are contiguous pieces of `stream` from random places that do not overlap.

    Raises:
        InputError: the stream is too short.
    """
    need = passage + gap
    total = stream.numel()
    if total < need:
        raise InputError(
            f"Copy perplexity needs a text of at least {need} tokens; this one has {total}."
        )
    rng = random.Random(seed)
    rows = []
    for _ in range(samples):
        # Both orders of passage and gap in the text, with a random split of the slack.
        slack = sorted(rng.randint(0, total - need) for _ in range(2))
        if rng.random() < 0.5:
            first, second = slack[0], slack[1] + passage
        else:
            second, first = slack[0], slack[1] + gap
        piece = stream[first : first + passage]
        rows.append(torch.cat([piece, stream[second : second + gap], piece]))
    return torch.stack(rows)


def copy_perplexity(
    model: nn.Module,
    stream: torch.Tensor,
    *,
    samples: int = 6,
    passage: int = 200,
    gap: int = 700,
    skip: int = 20,
    seed: int = 0,
    batch: int = 1,
) -> Measurement:
    """Perplexity of a passage that stood `gap` tokens earlier, after its first `skip` tokens.

    A model that copies is near 1; one that cannot look back that far is near its plain perplexity.

    Args:
        stream: (tokens,) int64, the text that passages and gaps are taken from.
    """
    rows = copy_rows(stream, samples, passage, gap, seed)
    with evaluating(model):
        losses = row_losses(model, rows, batch)[:, passage + gap + skip - 1 :]
    units = [(float(row.sum()), float(row.numel())) for row in losses]
    return pooled("copy perplexity", units, tokens=losses.numel(), transform="exp")


FILLER = (
    " The tram stops by the harbour. A boat leaves at noon. Rain is on its way.",
    " The baker opens early. The square is quiet. Somebody sweeps the steps.",
    " Two gulls sit on the wall. The clock is slow again. Tea is ready.",
)


@dataclass(frozen=True)
class PasskeyTask:
    """One question: prompt ids, the ids that must follow, and where the key stood."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    length: int
    depth: float


def passkey_tasks(
    tokenizer: Any,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 2,
    seed: int = 0,
) -> list[PasskeyTask]:
    """Prompts of about `length` tokens that hide a five-digit key at a relative depth.

    Raises:
        InputError: a length leaves no room for the key and the question.
    """

    def coded(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    rng = random.Random(seed)
    fillers = [coded(text) for text in FILLER]
    tasks = []
    for length in lengths:
        for depth in depths:
            for _ in range(samples):
                key = str(rng.randint(10_000, 99_999))
                head = coded("Somewhere in this text a pass key is hidden. Remember it.")
                needle = coded(f" The pass key is {key}. Remember it: {key} is the pass key.")
                question = coded("\n\nWhat is the pass key? The pass key is")
                room = length - len(head) - len(needle) - len(question)
                if room < 0:
                    raise InputError(
                        f"A pass key prompt of {length} tokens has no room for the key and the "
                        f"question: give at least {length - room}."
                    )
                body: list[int] = []
                while len(body) < room:
                    body += rng.choice(fillers)
                body = body[:room]
                cut = round(depth * room)
                prompt = head + body[:cut] + needle + body[cut:] + question
                # The answer as the tokenizer cuts it after the question.
                whole = coded("The pass key is " + key)
                answer = whole[len(coded("The pass key is")) :]
                tasks.append(PasskeyTask(tuple(prompt), tuple(answer), length, depth))
    return tasks


def passkey(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 2,
    seed: int = 0,
) -> Measurement:
    """Share of keys that greedy decoding would give back in full, also by length and depth.

    The answer is fed along with the prompt and every one of its tokens has to be the most likely
    one, which is the same as greedy decoding and needs one forward.
    """
    hits: dict[tuple[int, float], list[bool]] = {}
    with evaluating(model):
        for task in passkey_tasks(tokenizer, lengths, depths, samples, seed):
            ids = torch.tensor([[*task.prompt, *task.answer]])
            logits = logits_of(model, ids)[0, len(task.prompt) - 1 : -1]
            hit = bool((logits.argmax(-1).cpu() == torch.tensor(task.answer)).all())
            hits.setdefault((task.length, task.depth), []).append(hit)
    parts = {
        f"{length} tokens, depth {depth:g}": sum(group) / len(group)
        for (length, depth), group in hits.items()
    }
    return proportion("pass key", [hit for group in hits.values() for hit in group], parts)


@dataclass(frozen=True)
class TeacherGap:
    """Distance between the next-token distributions of student and teacher."""

    kl: Measurement
    top1: Measurement


def teacher_gap(
    student: nn.Module, teacher: nn.Module, rows: torch.Tensor, *, batch: int = 1
) -> TeacherGap:
    """KL(teacher || student) in nats a token and top-1 agreement, in one pass over (rows, N)."""
    kl_units: list[tuple[float, float]] = []
    hit_units: list[tuple[float, float]] = []
    with evaluating(student, teacher):
        for start in range(0, rows.shape[0], batch):
            part = rows[start : start + batch]
            ours, theirs = logits_of(student, part), logits_of(teacher, part)
            for s, t in zip(ours, theirs, strict=True):
                kl, hits = _distance(s, t)
                kl_units.append((kl, float(s.shape[0])))
                hit_units.append((hits, float(s.shape[0])))
    tokens = rows.numel()
    return TeacherGap(
        pooled("KL to teacher", kl_units, tokens=tokens),
        pooled("top-1 agreement", hit_units, tokens=tokens, better="high"),
    )


def _distance(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Sum of KL and number of equal top tokens over (N, V) logits."""
    kl, hits = 0.0, 0.0
    for start in range(0, student.shape[0], CHUNK):
        log_s = student[start : start + CHUNK].float().log_softmax(-1)
        log_t = teacher[start : start + CHUNK].float().log_softmax(-1)
        kl += float((log_t.exp() * (log_t - log_s)).sum(-1).double().sum())
        hits += float((log_s.argmax(-1) == log_t.argmax(-1)).sum())
    return kl, hits


def kl_to_teacher(
    student: nn.Module, teacher: nn.Module, rows: torch.Tensor, *, batch: int = 1
) -> Measurement:
    """KL(teacher || student) in nats a token."""
    return teacher_gap(student, teacher, rows, batch=batch).kl


def top1_agreement(
    student: nn.Module, teacher: nn.Module, rows: torch.Tensor, *, batch: int = 1
) -> Measurement:
    """Share of positions where both give the same token the highest probability."""
    return teacher_gap(student, teacher, rows, batch=batch).top1
