"""Every kind of bad input: one error class, one line that says what and where, nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_stubs import edit_json, plan_for, tiny_bert, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file

from rewriter.checkpoint import open_checkpoint, save
from rewriter.errors import InputError, NoSiteError, RewriterError, UsageError
from rewriter.plan import PLAN_VERSION, Plan
from rewriter.policy import Policy, make_plan

pytestmark = pytest.mark.usefixtures("stub_mixers")
Break = Callable[[Path], Path | None]


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "one")
    tiny_llama().save_pretrained(folder / "many", max_shard_size="15KB")
    return folder


@pytest.fixture
def model(_saved: Path, tmp_path: Path) -> Path:
    return _copied(_saved / "one", tmp_path / "model")


def _copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def convert(path: Path, out: Path, **options: object) -> None:
    """What a conversion does with its input, in order."""
    source = open_checkpoint(path, **options)  # type: ignore[arg-type]
    save(source.model, out, plan_for([]))


def refused(kind: type[RewriterError], action: Callable[[], object], *parts: str) -> str:
    with pytest.raises(RewriterError) as caught:
        action()
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message, message
    return message


def refused_model(model: Path, *parts: str, **options: object) -> None:
    before = sorted(p.name for p in model.parent.iterdir())
    refused(InputError, lambda: convert(model, model.parent / "out", **options), *parts)
    assert sorted(p.name for p in model.parent.iterdir()) == before


# ---- safetensors files ---------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncated_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def truncated_to_nothing(path: Path) -> None:
    path.write_bytes(b"\x01")


def corrupt_header(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8:20] = b"\xff" * 12
    path.write_bytes(bytes(raw))


def length_bomb(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63 - 1) + path.read_bytes()[8:])


def nesting_bomb(path: Path) -> None:
    text = b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def offsets_beyond_the_end(path: Path) -> None:
    header, data = header_of(path)
    entry = header["model.norm.weight"]
    start, stop = entry["data_offsets"]  # type: ignore[index]
    entry["data_offsets"] = [start + 10**9, stop + 10**9]  # type: ignore[index]
    with_header(path, header, data)


def overlapping(path: Path) -> None:
    header, data = header_of(path)
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]  # type: ignore[index]
    with_header(path, header, data)


def size_contradicts_shape(path: Path) -> None:
    header, data = header_of(path)
    header["model.norm.weight"]["shape"] = [31]  # type: ignore[index]
    with_header(path, header, data)


def negative_shape(path: Path) -> None:
    header, data = header_of(path)
    header["model.norm.weight"]["shape"] = [-4, -8]  # type: ignore[index]
    with_header(path, header, data)


def unknown_dtype(path: Path) -> None:
    header, data = header_of(path)
    header["model.norm.weight"]["dtype"] = "F3"  # type: ignore[index]
    with_header(path, header, data)


def header_without_mapping(path: Path) -> None:
    with_header(path, [1, 2], b"")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncated, ("is truncated: tensor '", "fetch it again")),
        (truncated_in_header, ("truncated", "header claims")),
        (truncated_to_nothing, ("truncated",)),
        (corrupt_header, ("corrupt safetensors header",)),
        (length_bomb, ("9223372036854775807 bytes",)),
        (nesting_bomb, ("corrupt safetensors header",)),
        (offsets_beyond_the_end, ("'model.norm.weight' should end at byte",)),
        (overlapping, ("overlaps",)),
        (size_contradicts_shape, ("'model.norm.weight' of shape [31]", "needs 124")),
        (negative_shape, ("'model.norm.weight' of shape [-4, -8]",)),
        (unknown_dtype, ("'model.norm.weight' has the dtype 'F3'",)),
        (header_without_mapping, ("no mapping",)),
    ],
)
def test_damaged_safetensors(
    model: Path, damage: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    damage(model / "model.safetensors")
    refused_model(model, "model.safetensors", *parts)


def rewrite_weights(model: Path, **changes: torch.Tensor | None) -> None:
    path = model / "model.safetensors"
    state = {**load_file(path), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata={"format": "pt"})


def test_wrong_shape_names_tensor_file_and_both_shapes(model: Path) -> None:
    edit_json(model / "config.json", intermediate_size=40)
    refused_model(model, "model.safetensors: tensor 'model.layers.0.mlp.", "48", "40")


def test_missing_key(model: Path) -> None:
    rewrite_weights(model, **{"model.norm.weight": None})
    refused_model(model, "lacks the tensor 'model.norm.weight'", "LlamaForCausalLM", "at random")


def test_missing_layers_are_counted(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=3)
    refused_model(model, "lacks the tensors 'model.layers.2.", "and 6 more")


def test_extra_key(model: Path, tmp_path: Path) -> None:
    rewrite_weights(model, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})
    refused_model(model, "'model.layers.9.mlp.up_proj.weight' for which LlamaForCausalLM")
    assert open_checkpoint(model, drop_extra=True).model is not None


def test_missing_shard(_saved: Path, tmp_path: Path) -> None:
    model = _copied(_saved / "many", tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    refused_model(model, f"shard {shard.name} is missing", "complete the download")


def test_index_leads_outside(_saved: Path, tmp_path: Path) -> None:
    model = _copied(_saved / "many", tmp_path / "model")
    edit_json(model / "model.safetensors.index.json", weight_map={"a": "../elsewhere.safetensors"})
    refused_model(model, "'../elsewhere.safetensors' outside its directory")


def test_tensor_not_in_the_shard_the_index_names(_saved: Path, tmp_path: Path) -> None:
    model = _copied(_saved / "many", tmp_path / "model")
    index = model / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**mapping, "ghost": sorted(mapping.values())[0]})
    refused_model(model, "the tensor 'ghost' is not in")


# ---- directories and configs ---------------------------------------------------------------------


def test_path_does_not_exist(tmp_path: Path) -> None:
    refused_model(tmp_path / "nowhere", "nowhere does not exist")


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused_model(tmp_path / "empty", "empty is empty", "model directory")


def test_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused_model(tmp_path / "notes.txt", "notes.txt is not a checkpoint", ".safetensors")


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "a.txt").write_text("")
    refused_model(tmp_path / "stuff", "no config.json in", "is this a model directory?")


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused_model(model, "no weights in", "complete the download")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds no JSON object"),
        ("{}", "names no 'model_type'"),
        ('{"model_type": "llamma"}', "does not know the model type 'llamma'"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}', "such code is never run"),
        ('{"model_type": "llama"}', "names no 'architectures'"),
        ('{"model_type": "llama", "architectures": ["LlamaForFun"]}', "no class 'LlamaForFun'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json is not a usable config"),
        (
            '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], '
            '"quantization_config": {"quant_method": "gptq"}}',
            "quantised (gptq)",
        ),
    ],
)
def test_bad_config(model: Path, text: str, part: str) -> None:
    (model / "config.json").write_text(text)
    refused_model(model, "config.json", part)


def test_config_of_another_class(model: Path) -> None:
    edit_json(model / "config.json", architectures=["BertModel"])
    refused_model(model, "no class 'BertModel' for the model type 'llama'")


def test_single_file_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused_model(model / "model.safetensors", "needs its config", "pass config=")


def test_adapter_directory(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused_model(tmp_path / "lora", "is an adapter; merge it")


def test_missing_tokenizer(model: Path) -> None:
    source = open_checkpoint(model)
    refused(InputError, lambda: source.tokenizer, "no tokenizer in", "tokenizer.json")
    assert not source.has_tokenizer


def test_damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    source = open_checkpoint(model)
    refused(InputError, lambda: source.tokenizer, "cannot be loaded")


def test_unknown_dtype_request(model: Path) -> None:
    refused(UsageError, lambda: open_checkpoint(model, dtype="fp8"), "unknown dtype 'fp8'")


# ---- pickles -------------------------------------------------------------------------------------


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_not_run(model: Path, tmp_path: Path, zipped: bool) -> None:
    state = {"model.norm.weight": torch.zeros(32), "x": Payload(model / "executed")}
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused_model(model, "pytorch_model.bin holds more than tensors", "safetensors")
    assert not (model / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_bin(model: Path, zipped: bool) -> None:
    path = model / "pytorch_model.bin"
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused_model(model, "pytorch_model.bin is truncated or not a torch file")


def test_bin_without_a_state_dict(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], model / "pytorch_model.bin")
    refused_model(model, "no mapping of names to tensors")


def test_good_bin_still_loads(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(model).model.model.norm.weight, state["model.norm.weight"])


# ---- policies and plans --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rules:\n  - use: kept\n", (":2:10:", "unknown mixer 'kept'", "did you mean 'keep'?")),
        ("ruls:\n  - use: keep\n", (":1:1:", "unknown key 'ruls'", "did you mean 'rules'?")),
        ("rules:\n  - use: keep\n    options: {window: 3}\n", (":3:15:", "no option 'window'")),
        ("default: keep\ndefault: keep\n", (":2:1:", "'default' is already given in line 1")),
        ("name: !!python/name:os.system\n", (":1:7:", "not allowed")),
        ("- 1\n", (":1:1:", "a policy is a mapping")),
        ("a: [\n", (":2:1:",)),
    ],
)
def test_bad_policy(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "p.yaml").write_text(text)
    refused(UsageError, lambda: Policy.load(tmp_path / "p.yaml"), "p.yaml", *parts)


def test_policy_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    refused(UsageError, lambda: Policy.load(tmp_path / "p.yaml"), "not UTF-8")


def test_plan_from_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": PLAN_VERSION + 1, "waves": []}))
    refused(UsageError, lambda: Plan.load(path), "plan.json", "newer version", "upgrade")


def test_plan_for_another_model(tmp_path: Path) -> None:
    plan = plan_for(["transformer.h.0.attn"])
    sites = [plan_for(["model.layers.0.self_attn"]).decisions[0]]
    from rewriter.ir.site import AttentionSite

    found = [AttentionSite.from_json(d.site) for d in sites]
    refused(UsageError, lambda: plan.check_against(found), "expects 'transformer.h.0.attn'")


def test_no_site_found() -> None:
    refused(NoSiteError, lambda: make_plan(Policy(), []), "no attention was found")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_good_checkpoints_still_load(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    original = make()
    original.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    again = open_checkpoint(tmp_path / "m").model
    assert type(again) is type(original)
    for key, value in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
