"""Probes whose answers stand somewhere in the text: associative recall and nested lists."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch import nn

from rewriter.errors import InputError
from rewriter.evaluate.measurement import Measurement, pooled, proportion
from rewriter.evaluate.scoring import evaluating, logits_of


def recall_rows(stream: torch.Tensor, pairs: int, samples: int = 4, seed: int = 0) -> torch.Tensor:
    """(samples, 4 * pairs): keys each followed by its value, then all again in another order.

    Keys and values are different tokens of the text (multi-query associative recall; Arora et al.,
    Zoology, 2023).

    Raises:
        InputError: the text has too few different tokens.
    """
    known = torch.unique(stream)
    if known.numel() < 2 * pairs:
        raise InputError(
            f"Recalling {pairs} pairs needs a text of {2 * pairs} different tokens; this one has "
            f"{known.numel()}."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        drawn = known[torch.randperm(known.numel(), generator=generator)[: 2 * pairs]]
        table = drawn.reshape(pairs, 2)
        again = table[torch.randperm(pairs, generator=generator)]
        rows.append(torch.cat([table, again]).flatten())
    return torch.stack(rows)


def recall(
    model: nn.Module,
    stream: torch.Tensor,
    *,
    pairs: Sequence[int] = (16, 64, 256),
    samples: int = 4,
    seed: int = 0,
) -> Measurement:
    """Share of values that are the most likely token after their key's second appearance.

    Args:
        stream: (tokens,) int64 text that gives the tokens.
        pairs: numbers of pairs; each is a part of the result.
    """
    units: list[tuple[float, float]] = []
    parts: dict[str, float] = {}
    with evaluating(model):
        for count in pairs:
            rows = recall_rows(stream, count, samples, seed)
            asked = torch.arange(2 * count, 4 * count, 2)
            shares = []
            for row in rows:
                best = logits_of(model, row[None])[0, asked].argmax(-1).cpu()
                shares.append(float((best == row[asked + 1]).float().mean()))
            units += [(share * count, float(count)) for share in shares]
            parts[f"{count} pairs"] = sum(shares) / len(shares)
    tokens = samples * sum(pairs)
    return pooled("associative recall", units, tokens=tokens, parts=parts, better="high")


_OPERATORS: Mapping[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": median_low,
    "SM": lambda values: sum(values) % 10,
}
_EXAMPLES = 3


@dataclass(frozen=True)
class ListTask:
    """Prompt ids that end before the answer, and the digit that is right."""

    prompt: tuple[int, ...]
    answer: int
    length: int


def nested_list(rng: random.Random, words: int, depth: int = 4) -> tuple[str, int]:
    """A nested list of about `words` words and its value (ListOps; Nangia and Bowman, 2018)."""
    name = rng.choice(sorted(_OPERATORS))
    parts: list[str] = []
    values: list[int] = []
    left = max(words - 2, 2)
    while left > 0:
        size = rng.randint(4, max(4, left // 2)) if depth > 1 and left > 8 else 1
        text, value = (
            nested_list(rng, size, depth - 1) if size > 1 else (str(d := rng.randrange(10)), d)
        )
        parts.append(text)
        values.append(value)
        left -= max(size, len(text.split()))
    return f"[{name} {' '.join(parts)} ]", _OPERATORS[name](values)


def list_tasks(
    tokenizer: Any, lengths: Sequence[int] = (256, 512), samples: int = 8, seed: int = 0
) -> list[ListTask]:
    """Three short solved lists, then one that brings the prompt near to `length` tokens.

    Raises:
        InputError: a length has no room for the examples.
    """
    rng = random.Random(seed)
    tasks = []
    for length in lengths:
        for _ in range(samples):
            solved = "".join(
                f"{text} = {value}\n"
                for text, value in (nested_list(rng, 6) for _ in range(_EXAMPLES))
            )
            room = length - len(_coded(tokenizer, solved))
            words = room
            while True:
                text, value = nested_list(rng, words)
                prompt = _coded(tokenizer, f"{solved}{text} =")
                if len(prompt) <= length:
                    break
                words = words * 4 // 5
                if words < 4:
                    raise InputError(f"A list of {length} tokens is too short: give at least 128.")
            tasks.append(ListTask(tuple(prompt), value, length))
    return tasks


def lists(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (256, 512),
    samples: int = 8,
    seed: int = 0,
) -> Measurement:
    """Share of nested lists whose value is the most likely of the ten digits; chance is 0.1."""
    lead, digits = _digits(tokenizer)
    hits: dict[int, list[bool]] = {}
    with evaluating(model):
        for task in list_tasks(tokenizer, lengths, samples, seed):
            ids = torch.tensor([[*task.prompt, *lead]])
            scores = logits_of(model, ids)[0, -1, torch.tensor(digits)]
            hits.setdefault(task.length, []).append(int(scores.argmax()) == task.answer)
    parts = {f"{length} tokens": sum(group) / len(group) for length, group in hits.items()}
    return proportion("nested lists", [hit for group in hits.values() for hit in group], parts)


def _coded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _digits(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What every answer begins with, and the ten tokens that differ.

    Raises:
        InputError: the tokenizer does not write the digits alike.
    """
    start = len(_coded(tokenizer, "] ="))
    answers = [_coded(tokenizer, f"] = {digit}")[start:] for digit in range(10)]
    lead, last = answers[0][:-1], [answer[-1] for answer in answers if answer]
    if any(a[:-1] != lead for a in answers) or len(set(last)) < 10:
        raise InputError(
            "Nested lists need a tokenizer that writes each digit as one token of its own."
        )
    return lead, last
