"""Losses inside the models: relations against the papers' formula, hidden states, an encoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distill_standin import VOCABULARY, tiny_teacher
from torch import Tensor
from transformers import BertConfig, BertModel

from rewriter import rewrite
from rewriter.distill import Rows, distill, parse_config, within
from rewriter.distill.config import Relations
from rewriter.distill.match_logits import MatchLogits
from rewriter.distill.relations import relation_error
from rewriter.errors import UsageError
from rewriter.mixers.tokens import Tokens

B, N = 2, 11


def tokens(heads: int, kv: int, width: int, seed: int, valid: Tensor | None = None) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, N, width, generator=g) for h in (heads, kv, kv))
    return Tokens(q, k, v, valid=valid)


def by_rows(ours: Tokens, theirs: Tokens, pair: str, heads: int, causal: bool) -> Tensor:
    """(1 / (A |x|)) sum KL(R_teacher || R_student), row by row in float64 (MiniLMv2)."""

    def relations(x: Tokens, b: int, a: int, i: int) -> Tensor:
        sides = {"q": x.q, "k": x.k, "v": x.v}
        vectors = []
        for letter in pair:
            side = sides[letter][b].double()
            if pair == "qk" and letter == "k":
                side = side.repeat_interleave(x.q.shape[1] // x.k.shape[1], 0)
            beside = torch.cat(list(side), -1)  # (n, width of all heads)
            part = beside.shape[-1] // heads
            vectors.append(beside[:, a * part : (a + 1) * part])
        seen = [
            j for j in range(i + 1 if causal else N) if ours.valid is None or bool(ours.valid[b, j])
        ]
        left, right = vectors[0][i], vectors[1][seen]
        return (right @ left / math.sqrt(left.shape[0])).softmax(-1)

    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(B):
        for i in range(N):
            if ours.valid is not None and not bool(ours.valid[b, i]):
                continue
            count += 1
            for a in range(heads):
                p, q = relations(theirs, b, a, i), relations(ours, b, a, i)
                total = total + (p * (p.log() - q.log())).sum()
    return total / (count * heads)


PADDED = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 9 + [0, 0]]).bool()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("valid", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("of", [("qq", "kk", "vv"), ("qk", "vv")])
def test_error_and_gradients_are_those_of_the_formula(
    of: tuple[Any, ...], valid: Tensor | None, causal: bool
) -> None:
    theirs = tokens(4, 2, 6, 0, valid)
    ours = tokens(2, 1, 8, 1, valid)  # other heads and widths
    leaves = [x.requires_grad_() for x in (ours.q, ours.k, ours.v)]
    found = relation_error(ours, theirs, Relations(of=of, heads=4, rows=4), causal)
    wanted = sum((by_rows(ours, theirs, pair, 4, causal) for pair in of), start=torch.zeros(()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, leaves, allow_unused=True) for x in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_how_many_rows_are_held_changes_nothing_and_padding_has_no_say() -> None:
    ours, theirs = tokens(4, 2, 6, 1, PADDED), tokens(4, 2, 6, 0, PADDED)
    whole = relation_error(ours, theirs, Relations(rows=128), False)
    torch.testing.assert_close(relation_error(ours, theirs, Relations(rows=3), False), whole)
    ours.k[~PADDED[:, None].expand(-1, 2, -1)] = 1e4
    torch.testing.assert_close(relation_error(ours, theirs, Relations(), False), whole)


def test_equal_tokens_have_no_error_and_others_do() -> None:
    ours, other = tokens(4, 2, 6, 1), tokens(4, 2, 6, 2)
    assert float(relation_error(ours, ours, Relations(), True)) == pytest.approx(0, abs=1e-7)
    assert float(relation_error(ours, other, Relations(), True)) > 0.1


def test_channels_that_do_not_split_are_refused() -> None:
    with pytest.raises(UsageError, match="do not split into 5 relation heads"):
        relation_error(tokens(4, 2, 6, 1), tokens(4, 2, 6, 2), Relations(heads=5), True)


def test_without_a_number_each_pair_has_the_heads_of_the_teacher() -> None:
    """Three key heads of 8 channels cannot be nine relation heads, as nine query heads can."""
    theirs, ours = tokens(9, 3, 8, 0), tokens(9, 3, 8, 1)
    found = relation_error(ours, theirs, Relations(of=("qk", "qq", "kk", "vv")), True)
    heads = {"qk": 9, "qq": 9, "kk": 3, "vv": 3}
    wanted = sum(
        (by_rows(ours, theirs, pair, count, True) for pair, count in heads.items()),
        start=torch.zeros(()),
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def config(**options: Any) -> Any:
    logits = {"steps": 12, "train": "all", "lr": 1e-2, "body_lr": 3e-3, "warmup": 0, **options}
    return parse_config({"length": 24, "fit": 0, "dtype": "float32", "logits": logits})


def language_rows() -> Rows:
    return Rows(torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(3)))


def student_of(teacher: torch.nn.Module, use: str = "hedgehog", **options: Any) -> torch.nn.Module:
    policy = {"rules": [{"use": use, "options": options}]}
    return rewrite(teacher, policy, verify="none", force=True)


def test_a_student_that_is_its_teacher_has_no_error_inside() -> None:
    teacher = tiny_teacher()
    student = student_of(teacher, "hedgehog_window", window=64)
    settings = config(divergence=0, hidden=1.0, relations={"of": ["qk", "vv"]})
    stage = MatchLogits(teacher, student, settings)
    assert stage.backward(language_rows().take(torch.arange(2)), 1.0).total < 1e-6


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("losses", [{"hidden": 1.0}, {"relations": {"heads": 2}}], ids=str)
def test_the_losses_fall(losses: dict[str, Any], train: str) -> None:
    teacher = tiny_teacher()
    settings = config(divergence=0, train=train, steps=30, batch=8, body_lr=1e-3, **losses)
    (stage,) = distill(teacher, student_of(teacher), language_rows(), settings).stages
    assert stage.last < 0.9 * stage.first


def test_in_the_first_layer_the_untrained_student_has_the_relations_of_the_teacher() -> None:
    teacher = tiny_teacher()
    settings = config(divergence=0, relations={"layer": 0})
    stage = MatchLogits(teacher, student_of(teacher), settings)
    assert stage.backward(language_rows(), 1.0).total == pytest.approx(0, abs=1e-6)


def test_the_sum_of_all_losses_is_trained() -> None:
    teacher = tiny_teacher()
    rows = language_rows().take(torch.arange(2))

    def loss(**options: Any) -> float:
        stage = MatchLogits(teacher, student_of(teacher), config(**options))
        return stage.backward(rows, 1.0).total

    parts = [
        loss(),
        loss(divergence=0, hidden=1.0),
        loss(divergence=0, relations={}),
        loss(divergence=0.5, hidden=2.0, relations={"weight": 3.0}),
    ]
    assert parts[3] == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-5)


def test_an_encoder_without_logits_learns_from_relations() -> None:
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    teacher = BertModel(shape).eval()
    student = student_of(teacher)
    mask = torch.ones(8, 24, dtype=torch.int64)
    mask[::2, 17:] = 0
    rows = Rows(language_rows().ids, mask)
    settings = config(divergence=0, relations={"of": ["qk", "vv"]}, steps=25)
    (stage,) = distill(teacher, student, rows, settings).stages
    assert stage.last < 0.8 * stage.first
    with pytest.raises(UsageError, match="returns no"):
        distill(teacher, student_of(teacher), rows, config())


def test_what_cannot_be_matched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    student = student_of(teacher)
    with pytest.raises(UsageError, match="give 'divergence' or 'hidden' a weight"):
        config(divergence=0)
    with pytest.raises(UsageError, match="no rewritten module 7, only 2"):
        MatchLogits(teacher, student, config(relations={"layer": 7}))
    with pytest.raises(UsageError, match="No module is rewritten"):
        MatchLogits(teacher, teacher, config(hidden=1.0))
    stage = MatchLogits(teacher, student, config(relations={"heads": 7}))
    with pytest.raises(UsageError, match="of the student do not split into 7"):
        stage.backward(language_rows().take(torch.arange(1)), 1.0)
    monkeypatch.setattr(within, "size", lambda: 2)
    with pytest.raises(UsageError, match="one process only"):
        MatchLogits(teacher, student, config(hidden=1.0))
