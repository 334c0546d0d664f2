"""The matcher on programs in random spellings: equal ones are found, others refused."""

from __future__ import annotations

import random

import pytest
import torch

from rewriter.passes.capture import Captured, capture
from rewriter.passes.fuzz import campaign
from rewriter.passes.fuzz.breaking import BREAKING
from rewriter.passes.fuzz.check import LENGTH, facts, outputs_agree
from rewriter.passes.fuzz.program import SLOTS, Program, Recipe, inputs, random_edits
from rewriter.passes.fuzz.spec import Spec, random_spec
from rewriter.passes.fuzz.trace import Tracer
from rewriter.passes.match import match

DAILY_SEED, NIGHTLY_SEED = 11, 12


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer()


def _told(outcome: campaign.Outcome) -> str:
    return "\n".join(f"{f.recipe.describe()}\n  -> {f.verdict}" for f in outcome.failures)


def test_equivalent_spellings_are_found_with_equal_facts(tracer):
    outcome = campaign.run(campaign.equivalent(8, DAILY_SEED), tracer.capture, shrink_at_most=1)
    assert outcome.good == outcome.count, _told(outcome)


def test_breaking_edits_are_refused(tracer):
    outcome = campaign.run(campaign.broken(8, DAILY_SEED), tracer.capture, shrink_at_most=1)
    assert not outcome.failures, _told(outcome)


@pytest.mark.nightly
def test_two_thousand_equivalent_spellings(tracer):
    outcome = campaign.run(campaign.equivalent(2000, NIGHTLY_SEED), tracer.capture)
    assert outcome.good / outcome.count >= 0.995, _told(outcome)


@pytest.mark.nightly
def test_two_thousand_breaking_edits(tracer):
    outcome = campaign.run(campaign.broken(2000, NIGHTLY_SEED), tracer.capture)
    assert not outcome.failures, _told(outcome)
    assert outcome.invalid / outcome.count < 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(12))
def test_the_quick_capture_answers_like_export(tracer, number):
    rng = random.Random(number)
    spec = random_spec(rng)
    program = Program(Recipe(spec, random_edits(spec, rng), seed=number))
    args = inputs(spec, LENGTH)
    exported = capture(program, args)
    assert isinstance(exported, Captured), exported
    assert facts(match(exported)) == facts(match(tracer.capture(program, args)))


def test_an_edit_said_to_be_equal_is_checked_by_numbers():
    plain, capped = Program(Recipe(Spec())), Program(Recipe(Spec(softcap=1.0)))
    assert outputs_agree(plain, Program(Recipe(Spec(), {"mix": "einsum"})))
    assert not outputs_agree(capped, plain)


def test_shrinking_leaves_what_matters():
    def judge_by_mix(program: Program, args: tuple[torch.Tensor, ...]) -> Captured:
        if program.recipe.edits.get("mix") == "bmm":
            raise RuntimeError("found")
        return Tracer().capture(program, args)

    recipe = Recipe(Spec(), {"mix": "bmm", "merge": "view", "split_q": "unflatten"})
    small = campaign.shrink(recipe, campaign.Verdict("wrong"), judge_by_mix)
    assert small.edits == {"mix": "bmm"}


def test_names_are_unique_and_every_slot_has_a_canonical_spelling():
    for slot, table in SLOTS.items():
        assert len({e.name for e in table}) == len(table), slot
    names = [(e.slot, e.name) for e in BREAKING]
    assert len(set(names)) == len(names)
