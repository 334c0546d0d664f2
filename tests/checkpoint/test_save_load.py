from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stubs import (
    apply_plan,
    edit_json,
    plan_for,
    rewritten_llama,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    tokens,
)
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rewriter.checkpoint import is_rewritten, load, open_checkpoint, save
from rewriter.checkpoint.guard import guarded_plan
from rewriter.checkpoint.keys import forward_state_dict, new_keys, reverse_state_dict
from rewriter.checkpoint.manifest import MANIFEST, Manifest

pytestmark = pytest.mark.usefixtures("stub_mixers")


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(tmp_path: Path, tied: bool) -> None:
    model, plan = rewritten_llama(tied)
    save(model, tmp_path / "out", plan)
    again = load(tmp_path / "out", apply_plan=apply_plan)
    assert type(again) is LlamaForCausalLM
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert list(again.state_dict()) == list(model.state_dict())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(("make", "prefix"), [(tiny_gpt2, "transformer.h"), (tiny_bert, "encoder")])
def test_other_architectures(tmp_path: Path, make: object, prefix: str) -> None:
    model = make()  # type: ignore[operator]
    names = [n for n, _ in model.named_modules() if n.endswith((".attn", ".attention.self"))]
    assert len(names) == 2
    assert names[0].startswith(prefix)
    plan = plan_for(names)
    apply_plan(model, plan)
    save(model, tmp_path / "out", plan)
    again = load(tmp_path / "out", apply_plan=apply_plan)
    assert torch.equal(model(tokens())[0], again(tokens())[0])


def test_bfloat16_is_kept_and_casts_on_demand(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    model.to(torch.bfloat16)
    save(model, tmp_path / "out", plan)
    again = load(tmp_path / "out", apply_plan=apply_plan)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    wide = load(tmp_path / "out", dtype="float32", apply_plan=apply_plan)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_shards_cover_every_tensor_once(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan, max_shard_bytes=10_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    total = len(files)
    assert total > 2
    assert [f.name for f in files] == [
        f"rewritten-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)
    ]
    stored: list[str] = []
    for file in files:
        assert file.stat().st_size < 12_000
        with safe_open(file, "pt") as opened:
            stored += list(opened.keys())
    index = json.loads((tmp_path / "out" / "rewritten.safetensors.index.json").read_text())
    assert sorted(stored) == sorted(index["weight_map"])
    aliases = Manifest.read(tmp_path / "out", None).aliases
    assert sorted([*stored, *aliases]) == sorted(model.state_dict())
    again = load(tmp_path / "out", apply_plan=apply_plan)
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, plan = rewritten_llama(tied=True)
    save(model, tmp_path / "out", plan)
    manifest = Manifest.read(tmp_path / "out", None)
    assert manifest.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_views_of_one_storage_become_tensors(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(8.0)
            self.register_buffer("left", whole[:4])
            self.register_buffer("right", whole[4:])

    save(Halves(), tmp_path / "out", plan_for([]))
    again = load(tmp_path / "out", base=Halves(), apply_plan=apply_plan)
    assert again.get_buffer("right").tolist() == [4.0, 5.0, 6.0, 7.0]


def test_manifest_says_what_was_done(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    model.config.name_or_path = "/somewhere/private/tiny-llama"
    save(model, tmp_path / "out", plan)
    manifest = Manifest.read(tmp_path / "out", None)
    assert manifest.plan == plan
    assert manifest.base_architecture == "LlamaForCausalLM"
    assert manifest.original == "tiny-llama"
    assert manifest.new_keys == [f"model.layers.{i}.self_attn.core.gain" for i in range(2)]
    assert manifest.versions.torch == torch.__version__
    assert "/somewhere" not in (tmp_path / "out" / "config.json").read_text()


def test_generation_config_and_tokenizer_come_along(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "out", plan, tokenizer=tiny_tokenizer())
    again = load(tmp_path / "out", apply_plan=apply_plan)
    assert again.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w0 w5").input_ids == [3, 8]
    source = open_checkpoint(tmp_path / "out")
    assert source.kind == "rewritten"
    assert source.config.model_type == "llama"
    assert source.tokenizer("w1").input_ids == [4]


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForCausalLM, LlamaForCausalLM])
def test_unaware_loaders_fail_loudly(tmp_path: Path, loader: type) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan)
    with pytest.raises((ValueError, OSError)):
        loader.from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]


def test_unaware_loader_with_the_right_config_fails_too(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan)
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(tmp_path / "out", config=model.config)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_loaded_model_saves_itself_guarded(copied: Any, tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan)
    loaded = copied(load(tmp_path / "out", apply_plan=apply_plan))
    with torch.no_grad():
        loaded.get_parameter("model.norm.weight").mul_(2)
    loaded.save_pretrained(tmp_path / "again")
    assert guarded_plan(loaded) == plan
    assert is_rewritten(tmp_path / "again")
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", apply_plan=apply_plan)
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


def test_is_rewritten(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan)
    tiny_llama().save_pretrained(tmp_path / "plain")
    assert is_rewritten(tmp_path / "out")
    assert not is_rewritten(tmp_path / "plain")
    assert not is_rewritten(tmp_path)


def test_keys_go_forward_and_back() -> None:
    original = tiny_llama()
    model, _ = rewritten_llama()
    assert new_keys(model) == [f"model.layers.{i}.self_attn.core.gain" for i in range(2)]
    back = reverse_state_dict(model)
    assert list(back) == list(original.state_dict())
    original.load_state_dict(back, strict=True)
    there = forward_state_dict(original.state_dict(), model)
    assert list(there) == list(model.state_dict())
    model.load_state_dict(there, strict=True)
    assert forward_state_dict(original.state_dict()).keys() == original.state_dict().keys()


def test_a_module_called_core_of_the_original_is_not_dropped() -> None:
    model = nn.ModuleDict({"core": nn.Linear(2, 2)})
    assert list(reverse_state_dict(model)) == ["core.weight", "core.bias"]


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan, max_shard_bytes=10_000, tokenizer=tiny_tokenizer())
    save(model, tmp_path / "out", plan, overwrite=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "rewritten-00001-of-00001.safetensors" in names
    assert "tokenizer.json" not in names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_edited_manifest_is_accepted_on_request(tmp_path: Path) -> None:
    model, plan = rewritten_llama()
    save(model, tmp_path / "out", plan)
    edit_json(tmp_path / "out" / MANIFEST, original="renamed")
    load(tmp_path / "out", verify_hashes=False, apply_plan=apply_plan)
