"""Many random programs: build, verify that they are what they claim, match, judge, shrink."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rewriter.passes.capture import Captured
from rewriter.passes.fuzz.breaking import BREAKING
from rewriter.passes.fuzz.check import (
    LENGTH,
    Verdict,
    canonical_program,
    described,
    differences,
    gap,
    outputs_agree,
)
from rewriter.passes.fuzz.program import Program, Recipe, inputs, random_edits
from rewriter.passes.fuzz.spec import random_spec
from rewriter.passes.match import match

Capture = Callable[[Program, tuple[object, ...]], Captured]

_CLOSE = 1e-3
_DIFFERENT = 1e-3


def equivalent(count: int, seed: int) -> Iterator[Recipe]:
    """Random recipes that compute their spec."""
    for number in range(count):
        rng = random.Random(f"{seed}/equivalent/{number}")
        spec = random_spec(rng)
        yield Recipe(spec, random_edits(spec, rng), seed=number)


def broken(count: int, seed: int) -> Iterator[Recipe]:
    """Random recipes with one edit that changes what is computed; all edits take turns."""
    for number in range(count):
        edit = BREAKING[number % len(BREAKING)]
        rng = random.Random(f"{seed}/broken/{number}")
        for _ in range(1000):
            spec = random_spec(rng)
            if edit.when(spec, {}):
                break
        edits = {**random_edits(spec, rng, 0.3), "fused": "no"}
        yield Recipe(replace(spec, dropout=0.0), edits, edit, seed=number)


def judge(recipe: Recipe, capture: Capture) -> Verdict:
    """Build, check against the canonical program of the same spec, capture, match, compare."""
    program, canonical = Program(recipe), canonical_program(recipe)
    effect = "equal" if recipe.breaking is None else recipe.breaking.effect
    if effect == "equal" and not outputs_agree(program, canonical):
        return Verdict("not_equal", f"gap {gap(program, canonical):.2g}")
    if effect != "equal" and gap(program, canonical) < _DIFFERENT:
        return Verdict("not_different")
    program.train(recipe.spec.dropout > 0.0)
    captured = capture(program, inputs(recipe.spec, LENGTH))
    found = match(captured)
    if not found.matches:
        return Verdict("refused", "; ".join(m.reason for m in found.misses))
    if effect == "equal":
        wrong = differences(found, recipe)
        if wrong:
            return Verdict("wrong", wrong)
    item = found.matches[0]
    if item.site.mask.opaque is not None:
        return Verdict("refused", f"mask is {item.site.mask.describe()}")
    distance = described(item, captured, program)
    if not distance < _CLOSE:
        return Verdict("wrong", f"the facts do not describe the graph: off by {distance:.2g}")
    if effect == "refuse":
        return Verdict("wrong", f"accepted: {item.site.score} {item.site.mask.describe()}")
    return Verdict("found")


def fine(recipe: Recipe, verdict: Verdict) -> bool:
    """Whether this is what should happen."""
    if recipe.breaking is None:
        return verdict.answer == "found"
    return verdict.answer == "refused" or (
        recipe.breaking.effect == "truthful" and verdict.answer == "found"
    )


@dataclass(frozen=True)
class Failure:
    """A recipe that failed, as small as it could be made."""

    recipe: Recipe
    verdict: Verdict


@dataclass(frozen=True)
class Outcome:
    """Counts of one campaign; `invalid` programs were not what they claim and do not count."""

    count: int
    good: int
    invalid: int
    failures: tuple[Failure, ...]

    def describe(self) -> str:
        share = 100.0 * self.good / max(self.count - self.invalid, 1)
        tail = f", {self.invalid} not usable" if self.invalid else ""
        return f"{self.good} of {self.count - self.invalid} ({share:.2f} %){tail}"


def run(
    recipes: Iterable[Recipe],
    capture: Capture,
    shrink_at_most: int = 20,
    progress: Callable[[Recipe, Verdict], None] = lambda r, v: None,
) -> Outcome:
    """Judge every recipe; failures are shrunk, the first `shrink_at_most` of them."""
    good = invalid = count = 0
    failures: list[Failure] = []
    for recipe in recipes:
        verdict = _judged(recipe, capture)
        count += 1
        progress(recipe, verdict)
        if fine(recipe, verdict):
            good += 1
        elif verdict.answer == "not_different":
            invalid += 1
        else:
            small = recipe
            if len(failures) < shrink_at_most:
                small = shrink(recipe, verdict, capture)
            failures.append(Failure(small, _judged(small, capture)))
    return Outcome(count, good, invalid, tuple(failures))


def _judged(recipe: Recipe, capture: Capture) -> Verdict:
    try:
        return judge(recipe, capture)
    except Exception as error:  # a failing matcher is a finding too
        return Verdict("wrong", f"{type(error).__name__}: {error}")


def shrink(recipe: Recipe, verdict: Verdict, capture: Capture) -> Recipe:
    """The fewest edits and the plainest spec that still end in the same answer."""
    while True:
        for smaller in _smaller(recipe):
            if _judged(smaller, capture).answer == verdict.answer:
                recipe = smaller
                break
        else:
            return recipe


def _smaller(recipe: Recipe) -> Sequence[Recipe]:
    plain: list[Recipe] = []
    for slot in recipe.edits:
        rest = {s: n for s, n in recipe.edits.items() if s != slot}
        plain.append(replace(recipe, edits=rest))
    spec = recipe.spec
    simpler = (
        {"dropout": 0.0},
        {"norm": False},
        {"position": "none", "rotary_dim": 0},
        {"softcap": None},
        {"padding": False},
        {"mask": "none", "size": 0},
        {"mask": "causal", "size": 0},
        {"kv_heads": spec.heads},
        {"value_width": spec.width},
        {"scale": spec.width**-0.5},
        {"cross": False},
    )
    for change in simpler:
        if spec.mask == "none" and change.get("mask") == "causal":
            continue
        if any(getattr(spec, k) != v for k, v in change.items()):
            plain.append(replace(recipe, spec=replace(spec, **change)))
    return plain
