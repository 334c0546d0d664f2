from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rewriter.errors import InputError, UsageError
from rewriter.evaluate import (
    SuiteOptions,
    copy_perplexity,
    kl_to_teacher,
    measure,
    passkey,
    perplexity,
    teacher_gap,
    top1_agreement,
)
from rewriter.evaluate.quality import copy_rows, passkey_tasks

VOCABULARY = 128


class Bigram(nn.Module):
    """Logits of the next token are a table row of the last one."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        return self.table[input_ids]


class Induction(nn.Module):
    """Predicts what followed the last occurrence of the present `context` tokens, if that lies
    within `reach` tokens; else it is undecided. An attention that cannot look back is exactly
    this with a short reach."""

    def __init__(self, context: int, reach: int):
        super().__init__()
        self.context, self.reach = context, reach
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(self.context, len(row)):
                key = row[t - self.context + 1 : t + 1]
                for s in range(t - 1, max(self.context - 2, t - self.reach), -1):
                    if row[s - self.context + 1 : s + 1] == key:
                        logits[b, t, row[s + 1]] = 20.0
                        break
        return logits


class Characters:
    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, shape, generator=generator)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(1, 3), st.integers(0, 9))
def test_perplexity_is_the_exponential_of_the_mean_loss(
    rows: int, length: int, batch: int, seed: int
) -> None:
    model, ids = Bigram(seed), random_ids(rows, length, seed=seed)
    start = 1 + seed % (length - 1)
    result = perplexity(model, ids, batch=batch, start=start, buckets=3)
    log = model.table.detach().double().log_softmax(-1)
    losses = [[-log[r[t - 1], r[t]].item() for t in range(start, length)] for r in ids.tolist()]
    flat = [x for row in losses for x in row]
    assert result.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert result.tokens == len(flat) and result.samples == rows
    widths = []
    for name, value in result.parts.items():
        low, high = map(int, name.removeprefix("tokens ").split("-"))
        part = [x for row in losses for x in row[low - start : high + 1 - start]]
        assert value == pytest.approx(math.exp(sum(part) / len(part)), rel=1e-5)
        widths.append(high + 1 - low)
    assert sum(widths) == length - start
    assert result.low <= result.value * (1 + 1e-9) and result.value <= result.high * (1 + 1e-9)
    assert model.training  # its own mode is back


def test_copy_rows_are_passage_other_text_passage() -> None:
    stream = torch.arange(400)
    rows = copy_rows(stream, samples=40, passage=30, gap=50, seed=1)
    assert rows.shape == (40, 110)
    for row in rows:
        assert torch.equal(row[:30], row[80:])
        assert torch.equal(row[:30], torch.arange(int(row[0]), int(row[0]) + 30))
        assert torch.equal(row[30:80], torch.arange(int(row[30]), int(row[30]) + 50))
        assert not set(row[:30].tolist()) & set(row[30:80].tolist())
    assert torch.equal(rows, copy_rows(stream, samples=40, passage=30, gap=50, seed=1))
    assert not torch.equal(rows, copy_rows(stream, samples=40, passage=30, gap=50, seed=2))
    assert copy_rows(stream, passage=150, gap=250).shape == (6, 550)
    with pytest.raises(InputError, match="at least 401 tokens"):
        copy_rows(stream, passage=150, gap=251)


def test_copy_perplexity_sees_reach_and_nothing_else() -> None:
    stream = random_ids(600)
    far = copy_perplexity(Induction(3, 500), stream, samples=3, passage=30, gap=50, skip=5)
    near = copy_perplexity(Induction(3, 79), stream, samples=3, passage=30, gap=50, skip=5)
    assert far.value < 1.01 and far.tokens == 3 * 25
    assert near.value == pytest.approx(VOCABULARY, rel=1e-3)


def test_passkey_finds_the_depths_a_reach_covers() -> None:
    options: dict[str, Any] = {"lengths": (300, 400), "depths": (0.0, 1.0), "samples": 2}
    far = passkey(Induction(5, 1000), Characters(), **options)
    assert far.value == 1.0 and far.samples == 8 and far.high == 1.0 and far.low < 0.9
    near = passkey(Induction(5, 160), Characters(), **options)
    assert near.value == 0.5
    assert near.parts["300 tokens, depth 0"] == 0.0 and near.parts["400 tokens, depth 1"] == 1.0


def test_passkey_prompts_have_the_length_that_was_asked_for() -> None:
    for task in passkey_tasks(Characters(), (280, 500), (0.0, 0.3, 1.0), 2):
        assert len(task.prompt) == task.length
        text = "".join(map(chr, task.prompt))
        key = "".join(map(chr, task.answer)).strip()
        assert text.count(key) == 2 and text.endswith("The pass key is")
        assert len(key) == 5 and key.isdigit()
    with pytest.raises(InputError, match="no room"):
        passkey_tasks(Characters(), (100,))


def test_teacher_gap_against_the_plain_formula() -> None:
    student, teacher, ids = Bigram(0), Bigram(1), random_ids(3, 700)
    with torch.no_grad():
        teacher.table.copy_(student.table + 0.5 * teacher.table)
    gap = teacher_gap(student, teacher, ids, batch=2)
    s = student.table.detach().double().log_softmax(-1)
    t = teacher.table.detach().double().log_softmax(-1)
    kl = (t.exp() * (t - s)).sum(-1)
    same = s.argmax(-1) == t.argmax(-1)
    assert gap.kl.value == pytest.approx(kl[ids].mean().item(), rel=1e-4)
    assert gap.top1.value == pytest.approx(same[ids].double().mean().item())
    assert kl_to_teacher(teacher, teacher, ids).value == pytest.approx(0.0, abs=1e-9)
    assert top1_agreement(teacher, teacher, ids).value == 1.0


def test_suite_measures_what_was_asked_for() -> None:
    rows = random_ids(4, 120)
    options = SuiteOptions(
        rows=2, copy_samples=2, copy_passage=40, copy_gap=20, passkey_lengths=(260,)
    )
    out = measure(Bigram(0), Characters(), rows, teacher=Bigram(1), options=options)
    names = ["perplexity", "copy perplexity", "pass key", "KL to teacher", "top-1 agreement"]
    assert list(out) == names
    assert out["perplexity"].tokens == 2 * 60
    short = SuiteOptions(metrics=("perplexity", "teacher"), rows=2)
    assert list(measure(Bigram(0), Characters(), rows, options=short)) == ["perplexity"]
    with pytest.raises(UsageError, match="no metric 'ppl'"):
        SuiteOptions(metrics=("ppl",))


def test_a_model_without_logits_is_refused() -> None:
    class Flat(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids.float()

    with pytest.raises(UsageError, match="needs a causal language model"):
        perplexity(Flat(), random_ids(1, 8))
    with pytest.raises(InputError, match="longer than 8"):
        perplexity(Bigram(0), random_ids(1, 8), start=8)
