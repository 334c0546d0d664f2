"""A bias that meets scores whose groups stand where an equation puts them."""

from __future__ import annotations

import pytest

from rewriter.passes.fuzz import campaign
from rewriter.passes.fuzz.program import Recipe
from rewriter.passes.fuzz.spec import Spec
from rewriter.passes.fuzz.trace import Tracer


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
@pytest.mark.parametrize("product", ["einsum_hbnm", "matmul"])
@pytest.mark.parametrize("slopes", ["distance", "position", "from_end"])
def test_slopes_on_grouped_scores(heads: int, kv_heads: int, product: str, slopes: str) -> None:
    spec = Spec(
        heads=heads,
        kv_heads=kv_heads,
        width=8,
        value_width=8,
        mask="none",
        size=0,
        padding=False,
        scale=8**-0.5,
        softcap=None,
        position="alibi",
        rotary_dim=0,
        norm=False,
        cross=False,
        dropout=0.0,
        sinks=False,
    )
    recipe = Recipe(spec, {"repeat": "grouped", "product": product, "alibi": slopes})
    verdict = campaign.judge(recipe, Tracer().capture)
    assert verdict.answer == "found", verdict.why
