"""Rendering: golden tables at 80 columns, nothing cut off, no control codes."""

import io
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from rewriter.cli.session import plain
from rewriter.cli.show_contracts import contracts_view
from rewriter.cli.show_plan import plan_view
from rewriter.cli.show_sites import sites_view, story
from rewriter.cli.tables import number, place, ranges, size
from rewriter.ir.contract import ContractResult, judged
from rewriter.ir.mask import Causal, KeyPadding, Mask, Window
from rewriter.ir.site import AttentionSite, HeadGroups, NearMiss, Projection, Scale, Softcap, Source
from rewriter.plan import Decision, Plan


def rendered(parts: Sequence[RenderableType], width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    for part in parts:
        console.print(part, markup=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def site(index: int, window: int | None = None, owner: str = "model.layers.{}.self_attn"):
    fqn = owner.format(index)
    return AttentionSite(
        fqn=fqn,
        index=index,
        heads=HeadGroups(9, 3, 64, 64),
        score=(Scale(0.125), Softcap(50.0)) if window else (Scale(0.125),),
        terms=("mask",),
        mask=Mask((Causal(), *([Window(window)] if window else []), KeyPadding())),
        spelling="sdpa",
        source=Source("sdpa", fqn, "/x/site-packages/pkg/modeling.py", 12),
        position="rotary",
        rotary_dim=64,
        projections={
            role: Projection(f"{fqn}.{role[0]}_proj")
            for role in ("query", "key", "value", "output")
        },
    )


MISS = NearMiss(
    "mask", "the mask depends on data", Source("where_3", "model.head", "/a/b/c/d.py", 7)
)


def test_sites_of_one_kind() -> None:
    assert rendered(sites_view([site(0), site(29)], [])) == (
        """\
 #  module                     heads     mask             position  scale
─────────────────────────────────────────────────────────────────────────
 0  model.layers.0.self_attn   9/3 x 64  causal, padding  rotary    0.125
29  model.layers.29.self_attn  9/3 x 64  causal, padding  rotary    0.125

all of them
source       pkg/modeling.py:12
projections  q_proj, k_proj, v_proj, o_proj
softmax      sdpa

2 attention sites in 2 modules (2 causal), 0 near misses"""
    )


def test_sites_of_several_kinds_and_a_near_miss() -> None:
    text = rendered(sites_view([site(0), site(1, window=256)], [MISS]))
    assert "causal, window(256)," in text
    assert "kind a: 1 site (0)" in text
    assert "kind b: 1 site (1)" in text
    assert "softcap      50" in text
    assert "mask: the mask depends on data; node 'where_3' in 'model.head' (b/c/d.py:7)" in text
    assert text.endswith("2 attention sites in 2 modules (2 causal), 1 near miss")


def test_long_paths_wrap_and_are_never_cut() -> None:
    owner = "vision_model.encoder.stages.{}.blocks.some_rather_long_name.attention.self_attention"
    text = rendered(sites_view([site(3, owner=owner)], []))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    cells = "".join(line[3:].split("  ")[0].strip() for line in text.splitlines()[2:6])
    assert owner.format(3) in cells


def test_the_story_of_a_module_says_everything() -> None:
    text = rendered(story([site(1, window=8)], [MISS], {1: [1, 2]}, {}))
    assert "(i - j < 8)" in text
    assert "scale(value=0.125" in text
    assert "softcap(cap=50.0)" in text
    assert "near miss in model.head - not understood" in text


def test_plan() -> None:
    decisions = [
        Decision(fqn=f"model.layers.{i}.self_attn", index=i, target="keep") for i in range(2)
    ]
    decisions.append(
        Decision(
            fqn="model.layers.2.self_attn",
            index=2,
            target="sink_window",
            options={"window": 64, "sinks": None},
            tier="approximate",
        )
    )
    decisions.append(
        Decision(
            fqn="model.layers.3.self_attn",
            index=3,
            target="sink_window",
            tier="approximate",
            status="refused",
            reason="the mask is opaque",
        )
    )
    assert rendered(plan_view(Plan(policy="mine", decisions=decisions))) == (
        """\
#  module                    target       tier         status
──────────────────────────────────────────────────────────────
0  model.layers.0.self_attn  keep         exact        planned
1  model.layers.1.self_attn  keep         exact        planned
2  model.layers.2.self_attn  sink_window  approximate  planned
3  model.layers.3.self_attn  sink_window  approximate  refused

plan 'mine': 4 sites (2 exact, 1 approximate, 1 refused)
  2 x keep        no options; exact; sites 0-1
  1 x sink_window window=64, sinks=none; approximate; site 2

1 site refused, left unchanged
  - sink_window at site 3: the mask is opaque"""
    )


def test_contracts_are_grouped_and_failures_spelled_out() -> None:
    results = [
        judged(3, "prefill + decode", "sink_window at a.0 and 29 like it", 2e-6, 1e-4),
        judged(3, "prefill + decode", "model", 1e-6, 1e-4),
        judged(4, "causal", "model", 0.25, 1e-6, "row 3"),
        judged(4, "causal", "hedgehog at a.1", math.nan, 1e-6),
        ContractResult(9, "relative teacher gap", "a.0", "reported", 0.1),
        ContractResult(9, "relative teacher gap", "a.1", "reported", 0.4),
        ContractResult(10, "crossover (tokens)", "m at a", "reported", math.inf),
        ContractResult(5, "limit case", "m at a", "not applicable", detail="has none"),
    ]
    assert rendered(contracts_view(results)).replace("─", "") == GOLDEN_CONTRACTS


GOLDEN_CONTRACTS = """\

contracts: 2 failed, 2 passed, 3 reported, 1 not applicable
 #  check                 subject                    measured  bound  result

 3  prefill + decode      model, sink_window x30         2e-6   1e-4  pass
 4  causal                model, hedgehog                 nan   1e-6  fail
 5  limit case            m                                           n/a
 9  relative teacher gap  2 sites                  0.1 to 0.4         reported
10  crossover (tokens)    m                       not reached         reported

2 failures
  4 model: causal: 0.25, allowed 1e-6 (row 3)
  4 hedgehog at a.1: causal: nan, allowed 1e-6

notes
  5 limit case: has none"""


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_numbers(numbers: set[int]) -> None:
    found: set[int] = set()
    for part in filter(None, ranges(numbers).split(", ")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    assert found == numbers


NUMBERS = (
    *((None, ""), (0.0, "0"), (12.0, "12"), (1e-4, "1e-4"), (2.345e-7, "2.3e-7")),
    *(
        (0.1234, "0.123"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (123.456, "123"),
        (54321.5, "54322"),
    ),
)


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_sizes_and_places() -> None:
    assert [size(n) for n in (12, 1536, 3 * 2**20)] == ["12 B", "1.5 KiB", "3 MiB"]
    assert place("/v/site-packages/a/b.py", 3) == "a/b.py:3"
    assert place(None, None) == "unknown line"


def test_json_values_are_strict() -> None:
    value = {1: (math.inf, -math.inf, math.nan), "s": {"b", "a"}, "p": Mask()}
    assert plain(value) == {
        "1": ["Infinity", "-Infinity", "NaN"],
        "s": ["a", "b"],
        "p": "Mask(atoms=(), opaque=None)",
    }
