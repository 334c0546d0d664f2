"""Random masks are read right or called unknown, and every way to apply one is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rewriter.ir.site import AddTerm, FillTerm
from rewriter.passes.fuzz import campaign
from rewriter.passes.fuzz.mask_conditions import (
    Condition,
    causal,
    dilated,
    given_prefix,
    local,
    window,
)
from rewriter.passes.fuzz.mask_programs import (
    Predicate,
    Program,
    Verdict,
    arguments,
    judge,
    predicates,
)
from rewriter.passes.fuzz.masking import APPLICATIONS
from rewriter.passes.fuzz.program import Recipe
from rewriter.passes.fuzz.spec import Spec
from rewriter.passes.fuzz.trace import Tracer
from rewriter.passes.match import match
from rewriter.passes.match.mask import Evaluated, fit
from rewriter.passes.match.probe import Probe, ProbeError, run
from rewriter.passes.match.slices import slice_of
from rewriter.passes.match.view import View

DAILY_SEED, NIGHTLY_SEED = 3, 4


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer()


def _judged(tracer: Tracer, count: int, seed: int) -> list[str]:
    answers = []
    for predicate in predicates(count, seed):
        verdict = judge(predicate, tracer.capture)
        assert verdict.answer != "wrong", f"{predicate.describe()} -> {verdict}"
        answers.append(verdict.answer)
    return answers


def test_random_masks_are_right_or_unknown(tracer):
    answers = _judged(tracer, 40, DAILY_SEED)
    assert answers.count("right") > 20  # or nothing would be shown


@pytest.mark.nightly
def test_five_hundred_random_masks(tracer):
    assert _judged(tracer, 500, NIGHTLY_SEED).count("right") > 250


@pytest.mark.parametrize("radius", [5, 35, 128])
@pytest.mark.parametrize("apply", ["sdpa", "added"])
def test_a_distance_compared_by_its_square(tracer, radius, apply):
    verdict = judge(Predicate((("and", local(radius), 2),), apply), tracer.capture)
    assert verdict == Verdict("right", f"symmetric_window({radius})")


def test_a_limit_between_the_pairs_that_were_tried_is_unknown():
    near, far = torch.arange(26), torch.tensor([0, 1, 900, 901])
    seen = [Evaluated((p[:, None] - p).abs() <= 40, p, p) for p in (near, far)]
    assert fit(seen) is None


def test_a_partition_written_with_other_conditions_is_a_partition(tracer):
    """Causal, or both in the prefix and an even distance apart: groups, as the call shows."""
    parts = (("and", given_prefix(), 1), ("and", dilated(2), 0), ("or", causal(), 1))
    verdict = judge(Predicate(parts, "fill"), tracer.capture)
    assert verdict.answer in ("right", "opaque")


def test_a_wrong_reading_would_be_noticed(tracer):
    lying = Condition("lying", (lambda i, j, g: j < i, lambda i, j, g: j <= i))
    verdict = judge(Predicate((("and", lying, 1),), "where"), tracer.capture)
    assert verdict.answer == "wrong"


def test_chunks_cut_by_shifting_bits(tracer):
    wide = Condition(
        "chunk 64", (lambda i, j, g: i // 64 == j // 64, lambda i, j, g: (i >> 6) == (j >> 6))
    )
    verdict = judge(Predicate((("and", wide, 1),), "sdpa"), tracer.capture)
    assert (verdict.answer, verdict.said) == ("right", "chunk(64)")


def test_arguments_fit_the_program():
    for predicate in predicates(20, 1):
        assert Program(predicate)(*arguments(predicate)).isfinite().all()


@pytest.mark.parametrize("name", [e.name for e in APPLICATIONS])
@pytest.mark.parametrize("padding", [False, True])
def test_every_way_to_apply_a_mask_is_found(tracer, name, padding):
    recipe = Recipe(Spec(mask="window", size=3, padding=padding), {"apply": name})
    assert campaign.judge(recipe, tracer.capture).answer == "found"


class Masked(nn.Module):
    """Scores or probabilities under a causal mask of zeros and ones, in the given spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("ones", torch.ones(320, 320).tril())
        self.register_buffer("band", torch.ones(600, 600).tril().triu(-99).bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        s = q @ k.mT / 2
        n = x.shape[1]
        keep = self.ones[:n, :n] if self.spelling == "gpt2" else torch.ones(n, n).tril()
        if self.spelling == "gpt2":
            p = (s * keep - 1e4 * (1 - keep)).softmax(-1)
        elif self.spelling == "subtracted":
            p = (s - 1e9 * (1 - keep)).softmax(-1)
        elif self.spelling == "exponentials":
            e = torch.exp(s - s.amax(-1, keepdim=True)) * keep
            p = e / e.sum(-1, keepdim=True)
        elif self.spelling == "again":
            p = s.softmax(-1) * keep
            p = p / p.sum(-1, keepdim=True)
        elif self.spelling == "table":
            p = s.masked_fill(~self.band[:n, :n], -math.inf).softmax(-1)
        elif self.spelling == "product":
            p = (s * keep).softmax(-1)
        elif self.spelling == "late":
            p = s.softmax(-1) * keep
        elif self.spelling == "half blend":
            p = (s * keep - 1e4 * (0.5 - keep)).softmax(-1)
        else:
            wrong = s.sigmoid().round()
            p = (s * wrong - 1e4 * (1 - wrong)).softmax(-1)
        return self.out((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("spelling", "step"),
    [
        ("gpt2", FillTerm(0, -1e4, keep=True)),
        ("subtracted", AddTerm(0, -1.0)),
        ("exponentials", FillTerm(0, -math.inf, keep=True)),
        ("again", FillTerm(0, -math.inf, keep=True)),
    ],
)
def test_products_and_differences_that_are_masks(tracer, spelling, step):
    (item,) = match(tracer.capture(Masked(spelling), (torch.randn(2, 12, 8),))).matches
    assert item.site.mask.describe() == "causal"
    assert item.site.score[-1] == step


def test_a_window_that_only_a_kept_table_knows(tracer):
    (item,) = match(tracer.capture(Masked("table"), (torch.randn(2, 12, 8),))).matches
    assert item.site.mask.describe() == "causal & window(100)"


@pytest.mark.parametrize("spelling", ["product", "late", "half blend", "of the scores"])
def test_products_that_are_no_masks(tracer, spelling):
    result = match(tracer.capture(Masked(spelling), (torch.randn(2, 12, 8),)))
    assert not [m for m in result.matches if m.site.mask.opaque is None]


def test_a_probe_too_large_to_hold_is_refused_before_it_is_computed(tracer: Tracer) -> None:
    """A product of this mask's constants asks for 21,000 tokens: 7 GB for one comparison."""
    predicate = predicates(47, 8)[46]
    view = View(tracer.capture(Program(predicate), arguments(predicate)))
    unequal = next(n for n in view.graph.nodes if str(n.target) == "aten.eq.Scalar")
    part = slice_of(unequal, view)
    (documents,) = part.inputs
    with pytest.raises(ProbeError, match="would hold 6729 MiB"):
        run(part, Probe({}, {documents.name: torch.zeros(2, 21_000, dtype=torch.int64)}), view)


def test_an_input_that_hides_nothing_is_not_called_padding(tracer: Tracer) -> None:
    """Every token sees itself alone: no valid one could see a padded one, whatever the input."""
    parts = tuple(("and", c, 0) for c in (causal(), dilated(2), given_prefix(), window(2)))
    verdict = judge(Predicate(parts, "sdpa"), tracer.capture)
    assert verdict == Verdict("right", "causal & window(1)")
