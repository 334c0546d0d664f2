from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.checkpoint import gguf as reading
from rewriter.checkpoint import open_checkpoint
from rewriter.errors import InputError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_whole_file_passes(good: Path) -> None:
    reading.check(good)
    assert open_checkpoint(good).kind == "gguf"
    assert open_checkpoint(good.parent).kind == "gguf"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.99))
def test_every_truncation_is_refused(good: Path, share: float) -> None:
    content = good.read_bytes()
    # the padding after the last tensor may go, so the cut is before its data ends
    cut = good.with_name("cut.gguf")
    cut.write_bytes(content[: int(share * (len(content) - 64))])
    try:
        with pytest.raises(InputError, match=r"truncated|not a GGUF file"):
            reading.check(cut)
    finally:
        cut.unlink()


@pytest.mark.parametrize(
    ("at", "value", "part"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 99), "version 99"),
        (8, struct.pack("<Q", 2**60), "truncated or corrupt"),
        (16, struct.pack("<Q", 2**60), "truncated or corrupt"),
        (24, struct.pack("<Q", 2**63), "truncated or corrupt"),
    ],
)
def test_corrupt_headers(good: Path, tmp_path: Path, at: int, value: bytes, part: str) -> None:
    content = bytearray(good.read_bytes())
    content[at : at + len(value)] = value
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(bytes(content))
    with pytest.raises(InputError, match=part) as caught:
        open_checkpoint(bad)
    assert "bad.gguf" in str(caught.value)


def test_missing_extra_names_the_install(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(InputError, match=r"accelerate: pip install attention-rewriter\[gguf\]"):
        open_checkpoint(good)


def test_model_without_enough_metadata(good: Path) -> None:
    with pytest.raises(InputError, match=r"tiny.gguf"):
        _ = open_checkpoint(good).model


def test_two_files_in_one_directory(good: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(good.read_bytes())
    with pytest.raises(InputError, match="2 GGUF files; name one"):
        open_checkpoint(tmp_path)


def test_a_skeleton_is_given_only_of_a_complete_file(good: Path) -> None:
    """The tiny file lacks the tensors of its one layer: reading the model has to say so."""
    with pytest.raises(InputError, match=r"tiny.gguf"):
        _ = open_checkpoint(good).skeleton
