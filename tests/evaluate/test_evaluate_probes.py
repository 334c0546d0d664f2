"""Associative recall, nested lists, masked tokens, times: each against a model that must pass."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_evaluate_quality import VOCABULARY, Bigram, Characters, Induction, random_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.errors import InputError, UsageError
from rewriter.evaluate import SuiteOptions, lists, masked_accuracy, measure, recall, speed
from rewriter.evaluate.recall import list_tasks, nested_list, recall_rows


def test_recall_rows_ask_for_every_pair_once() -> None:
    rows = recall_rows(random_ids(400), 20, samples=3, seed=1)
    assert rows.shape == (3, 80)
    for row in rows:
        first, again = row[:40].reshape(20, 2), row[40:].reshape(20, 2)
        assert len(set(row[:40].tolist())) == 40
        assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, again.tolist()))
        assert not torch.equal(first, again)
    assert torch.equal(rows, recall_rows(random_ids(400), 20, samples=3, seed=1))


def test_recall_needs_a_model_that_looks_back() -> None:
    stream = random_ids(2000)
    whole = recall(Induction(1, 10_000), stream, pairs=(4, 32), samples=3)
    assert whole.value == whole.low == whole.high == 1.0 and whole.samples == 6
    assert whole.parts == {"4 pairs": 1.0, "32 pairs": 1.0} and whole.tokens == 108
    short = recall(Induction(1, 12), stream, pairs=(4, 32), samples=3)
    assert short.parts["4 pairs"] > 0.7 and short.parts["32 pairs"] < 0.4
    assert short.low <= short.value <= short.high
    with pytest.raises(InputError, match="300 different tokens"):
        recall_rows(stream, 150)


def value_of(text: str) -> int:
    """A nested list by its brackets alone."""
    stack: list[list[Any]] = [[]]
    for word in text.replace("[", "[ ").split():
        if word == "[":
            stack.append([])
        elif word == "]":
            name, *values = stack.pop()
            ordered = sorted(values)
            stack[-1].append(
                {
                    "MAX": ordered[-1],
                    "MIN": ordered[0],
                    "MED": ordered[(len(ordered) - 1) // 2],
                    "SM": sum(values) % 10,
                }[name]
            )
        else:
            stack[-1].append(int(word) if word.isdigit() else word)
    (result,) = stack[0]
    assert isinstance(result, int)
    return result


@pytest.mark.parametrize("words", [4, 6, 30, 200])
def test_nested_lists_have_the_value_they_say(words: int) -> None:
    rng = random.Random(words)
    for _ in range(30):
        text, value = nested_list(rng, words)
        assert value_of(text) == value
        assert len(text.split()) <= 2 * words + 8
    assert words < 30 or "[" in text[1:]


class Solver(nn.Module):
    """Says the value of the last list in its text of characters."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        text = "".join(map(chr, input_ids[0].tolist())).splitlines()[-1]
        assert text.endswith("= ")
        logits[0, -1, ord(str(value_of(text.removesuffix(" = "))))] = 1.0
        return logits


def test_lists_are_solved_by_a_solver_and_not_by_chance() -> None:
    found = lists(Solver(), Characters(), lengths=(200, 400), samples=6)
    assert found.value == 1.0 and found.samples == 12 and found.low < 1.0
    assert found.parts == {"200 tokens": 1.0, "400 tokens": 1.0}
    assert lists(Bigram(0), Characters(), lengths=(200,), samples=12).value < 0.6
    tasks = list_tasks(Characters(), (400,), 6)
    assert all(200 < len(t.prompt) <= 400 for t in tasks)
    with pytest.raises(InputError, match="too short"):
        list_tasks(Characters(), (40,), 1)


def test_lists_need_digits_of_their_own() -> None:
    class Words(Characters):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [sum(map(ord, word)) % 7 for word in text.split()]

    with pytest.raises(InputError, match="each digit"):
        lists(Bigram(0), Words(), samples=1)


class Guesses(nn.Module):
    """Says token 5 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.seen.append(input_ids)
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., 5] = 1.0
        return SimpleNamespace(logits=logits)


def test_masked_accuracy_scores_hidden_tokens_only() -> None:
    rows = torch.full((6, 40), 9)
    rows[:3] = 5
    model = Guesses()
    found = masked_accuracy(model, SimpleNamespace(mask_token_id=1), rows, share=0.2)
    assert found.value == 0.5 and found.samples == 6 and found.tokens == 48
    assert found.low < 0.5 < found.high and found.better == "high"
    assert all(bool(((x == 1).sum(-1) == 8).all()) for x in model.seen)
    with pytest.raises(InputError, match="no mask token"):
        masked_accuracy(model, SimpleNamespace(), rows)
    with pytest.raises(UsageError, match="language head"):
        bare = nn.Linear(1, 1)
        bare.forward = lambda input_ids: SimpleNamespace(last_hidden_state=input_ids)  # type: ignore[method-assign]
        masked_accuracy(bare, SimpleNamespace(mask_token_id=1), rows)


def test_speed_has_times_and_the_bytes_of_the_cache() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    found = {m.name: m for m in speed(model, 50, lengths=(8, 24), samples=2, steps=3)}
    assert list(found)[:2] == ["prefill at 8 tokens, ms", "one token at 8 tokens, ms"]
    assert all(m.value > 0 for m in found.values())
    assert found["one token at 24 tokens, ms"].samples == 6
    kept = 2 * 2 * 8 * 24 * 4  # layers, keys and values, width, tokens, bytes
    assert found["cache at 24 tokens, MiB"].value == pytest.approx(kept / 2**20)
    assert found["cache at 24 tokens, MiB"].interval == "none"


def test_the_suite_measures_what_is_asked_for() -> None:
    rows = random_ids(4, 200)
    options = SuiteOptions(metrics=("recall", "lists"), recall_pairs=(8,), list_lengths=(200,))
    found = measure(Induction(1, 10_000), Characters(), rows, options=options)
    assert list(found) == ["associative recall", "nested lists"]
    assert found["associative recall"].value == 1.0
    with pytest.raises(UsageError, match="no metric 'listops'"):
        SuiteOptions(metrics=("listops",))
