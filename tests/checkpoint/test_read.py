from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_stubs import tiny_gpt2, tiny_llama, tiny_tokenizer, tokens
from safetensors.torch import load_file

from rewriter.checkpoint import open_checkpoint
from rewriter.checkpoint.headers import read_header
from rewriter.checkpoint.weights import find_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_llama()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_directory_loads_exactly(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert source.kind == "directory"
    assert source.name == "llama"
    assert source.config.model_type == "llama"
    assert source.tokenizer("w3").input_ids == [6]
    model = source.model
    assert model is source.model
    assert model.generation_config.max_new_tokens == 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)


def test_nothing_is_loaded_before_it_is_asked_for(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert not {"config", "tokenizer", "model"} & source.__dict__.keys()


def test_shards(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="15KB")
    assert len(find_weights(tmp_path / "m").files) > 2
    model = open_checkpoint(tmp_path / "m").model
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)


def test_single_file_with_its_config_elsewhere(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "other.json"
    (folder / "config.json").rename(config)
    source = open_checkpoint(folder / "model.safetensors", config=config)
    assert source.kind == "file"
    assert source.name == "model"
    assert torch.equal(source.model(tokens()).logits, tiny_llama()(tokens()).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, stored: torch.dtype) -> None:
    tiny_llama().to(stored).save_pretrained(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").model.dtype == stored
    assert open_checkpoint(tmp_path / "m", dtype="float32").model.dtype == torch.float32
    assert open_checkpoint(tmp_path / "m", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_stored_dtype_wins_over_the_config(tmp_path: Path) -> None:
    from checkpoint_stubs import edit_json

    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", dtype="float32")
    assert open_checkpoint(tmp_path / "m").model.dtype == torch.bfloat16


def test_old_names_without_the_base_prefix_load(tmp_path: Path) -> None:
    """GPT-2 checkpoints of the first days leave out 'transformer.' and carry mask buffers."""
    from safetensors.torch import save_file

    tiny_gpt2().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    state = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(state, path, metadata={"format": "pt"})
    model = open_checkpoint(tmp_path / "m").model
    assert torch.equal(model(tokens()).logits, tiny_gpt2()(tokens()).logits)


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_checkpoint(folder)
    _ = (source.model, source.tokenizer)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_header_agrees_with_the_library(folder: Path) -> None:
    path = folder / "model.safetensors"
    reference = load_file(path)
    header = read_header(path)
    assert header.keys() == reference.keys()
    raw = path.read_bytes()
    for name, info in header.items():
        assert info.shape == tuple(reference[name].shape)
        assert raw[info.start : info.stop] == reference[name].numpy().tobytes()
