from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.distill import precision
from rewriter.distill.config import load_config, parse_config
from rewriter.distill.data import Order, Rows, packed_corpus, padded_corpus, read_texts
from rewriter.errors import InputError, UsageError


class Letters:
    """One token a character; 0 ends a document."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]

    def __call__(self, texts: list[str], max_length: int, **options: Any) -> dict[str, Any]:
        assert options == {"truncation": True, "padding": "max_length", "return_tensors": "pt"}
        rows = [[ord(c) for c in t][:max_length] for t in texts]
        ids = [r + [0] * (max_length - len(r)) for r in rows]
        mask = [[1] * len(r) + [0] * (max_length - len(r)) for r in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=8),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_packing_keeps_the_stream_and_holds_out_its_tail(
    texts: list[str], length: int, held_out: float
) -> None:
    stream = [token for text in texts for token in [*map(ord, text), 0]]
    try:
        corpus = packed_corpus(texts, Letters(), length, held_out)
    except InputError:
        assert len(stream) // length < (2 if held_out else 1)
        return
    joined = torch.cat([corpus.train.ids.flatten(), corpus.held_out.ids.flatten()]).tolist()
    assert joined == stream[: len(joined)] and len(stream) - len(joined) < length
    assert (len(corpus.held_out) > 0) == (held_out > 0)
    assert len(corpus.train) > 0 and corpus.train.mask is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(
    rows: int, batch: int, seed: int
) -> None:
    order = Order(rows, batch, seed)
    seen = torch.cat([order.batch_at(i) for i in range(3 * rows)]).tolist()
    assert len(seen) == 3 * rows * batch
    for epoch in range(3 * batch):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    again = Order(rows, batch, seed)
    assert torch.equal(again.batch_at(2), order.batch_at(2))
    if rows > 12:
        assert seen[:rows] != seen[rows : 2 * rows]
        assert not torch.equal(Order(rows, rows, seed + 1).batch_at(0), torch.tensor(seen[:rows]))


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\f\ntwo\n\f\n \f", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    lines = [json.dumps({"text": t, "id": 1}) for t in ("one", "two", "")]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    assert read_texts(str(tmp_path / "a.jsonl")) == ["one", "two"]

    class Split:
        column_names = ("text",)

        def __getitem__(self, key: str) -> list[str]:
            return ["one", "two"]

    fake = types.ModuleType("datasets")
    fake.load_from_disk = lambda path: {"train": Split()}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_texts(tmp_path) == ["one", "two"]


def test_bad_sources_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text(" \n\f\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": 1}\n', encoding="utf-8")
    (tmp_path / "worse.jsonl").write_text("{\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, message in (
        (tmp_path / "none.txt", "no text at"),
        (tmp_path / "empty.txt", "holds no text"),
        (tmp_path / "latin.txt", "not UTF-8"),
        (tmp_path / "bad.jsonl", "line 2 has no 'text'"),
        (tmp_path / "worse.jsonl", "line 1 is not JSON"),
        (tmp_path, "needs the package 'datasets'"),
        ([], "holds no text"),
    ):
        with pytest.raises(InputError, match=message):
            read_texts(source)
    with pytest.raises(InputError, match="at least 20 tokens"):
        packed_corpus(["too short"], Letters(), 10)


def test_padded_rows_for_encoders() -> None:
    corpus = padded_corpus(["ab", "abcdef", "c"], Letters(), length=4, held_out=0.3)
    assert corpus.train.ids.tolist() == [[97, 98, 0, 0], [97, 98, 99, 100]]
    assert corpus.train.mask is not None and corpus.train.mask.tolist() == [[1, 1, 0, 0], [1] * 4]
    assert len(corpus.held_out) == 1
    assert corpus.train.digest() != Rows(corpus.train.ids).digest()


def test_config_is_strict_and_reads_yaml_and_json(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("length: 64\nlayers: {max_seconds: 5, lr: 0.02}\n", encoding="utf-8")
    config = load_config(path)
    assert config.layers is not None and config.layers.lr == 0.02 and config.logits is None
    path.write_text(config.model_dump_json(), encoding="utf-8")
    assert load_config(path) == config
    for data, message in (
        ({"layers": {"steps": 1}, "lenght": 3}, "lenght"),
        ({"layers": {"steps": 0}}, "layers.steps"),
        ({"layers": {}}, "give 'steps' or 'max_seconds'"),
        ({}, "at least one of 'layers', 'logits' and 'long'"),
        ([], "document"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_config(data)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="neither JSON nor YAML"):
        load_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    for hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda it=hardware: it)
        assert precision.compute_dtype("auto", model) == expected
    assert precision.compute_dtype("bfloat16", model) == torch.bfloat16
    assert precision.compute_dtype("auto", model.to("meta")) == torch.bfloat16
