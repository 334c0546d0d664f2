"""`rewrite` on tiny models of every architecture: found, proved, replaced, generated with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CAUSAL, EAGER_ONLY, ENCODERS, VOCABULARY, build

import rewriter

DAILY = {
    ("llama", "sdpa"),
    ("mistral", "sdpa"),
    ("gpt2", "eager"),
    ("gemma2", "eager"),
    ("bloom", "eager"),
    ("bert", "eager"),
    ("vit", "sdpa"),
}
"""Grouped heads, window, partial rotary, fused projection, soft-capping, ALiBi in folded heads,
padding, images. The whole product runs every night; `tests/match` finds all of it every time."""
EXACT_DAILY = {("llama", "eager"), ("bloom", "eager")}
"""Masks and biases that a call has to bring."""
CASES = [
    pytest.param(
        name,
        implementation,
        marks=[] if (name, implementation) in DAILY else [pytest.mark.nightly],
    )
    for name in (*CAUSAL, *ENCODERS)
    for implementation in ("sdpa", "eager")
    if not (name in EAGER_ONLY and implementation == "sdpa")
]
NOT_BIT_EXACT = {"falcon": 1e-6}
"""One key head meets all query heads by broadcasting there, by sharing here: another summation."""
BIASED = {"bloom"}
LIMITED = {"mistral", "gemma2", "gemma3", "modernbert"}  # own windows: a linear branch sees more


def call(model: Any, batch: int = 2, length: int = 21) -> Any:
    generator = torch.Generator().manual_seed(4)
    if model.main_input_name == "pixel_values":
        with torch.no_grad():
            return model(torch.randn(batch, 3, 32, 32, generator=generator))[0]
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_every_site_is_found_proved_and_rewritten(name: str, implementation: str) -> None:
    model = build(name, implementation)
    wide = {"rules": [{"use": "sink_window", "options": {"window": 64, "sinks": 1}}]}
    result = rewriter.rewrite(model, wide, verify="quick", on_miss="error")
    report = rewriter.report_of(result)
    assert len(report.sites) == 2
    assert report.misses == ()
    assert [d.status for d in report.plan.decisions] == ["done", "done"]
    assert report.passed
    identity = [c for c in report.contracts if c.check == "identity plan equals the original"]
    measured = identity[0].measured
    assert measured is not None
    assert measured <= NOT_BIT_EXACT.get(name, 0.0), "the identity plan changes bits"
    expected = call(model)
    difference = (call(result) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-4


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(
            *case.values, marks=[] if case.values in EXACT_DAILY else [pytest.mark.nightly]
        )
        for case in CASES
    ],
)
def test_exact_cores_keep_every_contract(name: str, implementation: str) -> None:
    report = rewriter.report_of(rewriter.rewrite(build(name, implementation), "exact"))
    assert report.passed
    timed = [c for c in report.contracts if c.check == "crossover length (tokens)"]
    assert timed


def mostly(names: set[str], daily: set[str]) -> list[Any]:
    """All names; those outside `daily` run at night."""
    return [
        pytest.param(n, marks=[] if n in daily else [pytest.mark.nightly]) for n in sorted(names)
    ]


@pytest.mark.parametrize("name", mostly(set(CAUSAL) - BIASED - LIMITED, {"gpt_neox"}))
def test_learned_mixers_keep_every_contract(name: str) -> None:
    policy = {
        "rules": [
            {"use": "hedgehog", "layers": [0]},
            {"use": "hedgehog_window", "layers": [1], "options": {"window": 5, "sinks": 2}},
        ]
    }
    result = rewriter.rewrite(build(name), policy, verify="quick")
    report = rewriter.report_of(result)
    assert [d.status for d in report.plan.decisions] == ["done", "done"]
    assert report.passed


@pytest.mark.parametrize("name", mostly(set(CAUSAL), {"llama", "mistral", "bloom"}))
def test_generation_with_and_without_cache_and_padding(name: str) -> None:
    model = build(name)
    policy = {"rules": [{"use": "sink_window", "options": {"window": 5, "sinks": 2}}]}
    result = rewriter.rewrite(model, policy, verify="none")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = result.generate(ids, attention_mask=mask, use_cache=True, **options)
    plain = result.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    alone = result.generate(ids[1:, 4:], use_cache=True, **options)
    assert torch.equal(cached[1, 12:], alone[0, 8:])


@pytest.mark.parametrize(
    "mixer", mostly({"keep", "sink_window", "hedgehog", "hedgehog_window"}, {"hedgehog_window"})
)
def test_beams_agree_with_and_without_cache(mixer: str) -> None:
    result = rewriter.rewrite(build("llama"), {"rules": [{"use": mixer}]}, verify="none")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = result.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, result.generate(ids, use_cache=False, **options))


def test_decoding_that_needs_cropping_is_refused() -> None:
    result = rewriter.rewrite(build("llama"), "hedgehog", verify="none")
    ids = torch.randint(3, VOCABULARY, (1, 9))
    with pytest.raises(rewriter.RewriterError, match=r"crop|assisted"):
        result.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=6, do_sample=False)


def test_rewriting_twice_is_refused() -> None:
    result = rewriter.rewrite(build("llama"), "identity", verify="none")
    with pytest.raises(rewriter.RewriterError, match="rewritten already"):
        rewriter.rewrite(result, "identity")


def test_a_plan_replays() -> None:
    model = build("llama")
    first = rewriter.rewrite(model, "sink-window", verify="none")
    again = rewriter.rewrite(build("llama", seed=1), rewriter.plan_of(first), verify="none")
    assert rewriter.plan_of(again).decisions[0].target == "sink_window"
