"""The committed coverage table is complete and true: a sample of it by day, all of it at night."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from zoo import FAMILIES  # noqa: E402 (the zoo lives beside the examples)
from zoo.coverage import Case, Row, measure  # noqa: E402

TABLE = {
    row.case.key: row
    for row in map(Row.from_json, json.loads((ROOT / "docs/coverage.json").read_text())["rows"])
}
DAILY = {
    "siglip-vision/eager/inference/float32/dynamic",
    "deberta-v2/eager/inference/float32/dynamic",
    "convbert/eager/inference/float32/dynamic",
}
"""A single query, a content bias with a mask, a look-alike: spellings that few families share."""
KNOWN_GAPS = {
    "autoformer/eager/inference/float32/dynamic": "three sums are told as MLP blocks refused",
    "autoformer/eager/inference/float32/static": "the same",
    "autoformer/eager/training/float32/dynamic": "its training graph depends on data",
}
"""Cases that are not as they should be, each a defect to mend; no other may join them unseen."""


def test_every_family_is_in_the_table() -> None:
    plain = {(r.case.family, r.case.attention) for r in TABLE.values()}
    assert plain >= {(f.name, a) for f in FAMILIES.values() for a in f.implementations}


def test_the_table_has_no_false_match_and_misses_nothing() -> None:
    untraceable = {f.name for f in FAMILIES.values() if f.untraceable}
    assert {key for key, row in TABLE.items() if row.wrong} == set(KNOWN_GAPS)
    for key, row in TABLE.items():
        assert row.false == 0, key
        if key in KNOWN_GAPS:
            continue
        assert row.case.family in untraceable or row.right == row.found == row.expected, key
        assert not row.mlps_false, key
        assert row.case.family in untraceable or row.mlps_right == row.mlps, key


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=[] if k in DAILY else [pytest.mark.nightly]) for k in TABLE]
)
def test_the_table_is_what_is_measured(key: str) -> None:
    row = TABLE[key]
    assert row.case == Case(*key.split("/"))
    now = measure(row.case, FAMILIES[row.case.family], with_mlps=row.mlps >= 0)
    assert {**now.to_json(), "fused": row.fused} == row.to_json()
