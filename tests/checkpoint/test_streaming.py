"""Models larger than memory: weights stay in their files, and the result is the same to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.checkpoint import open_checkpoint, save, skeleton
from rewriter.checkpoint.paging import Pages, resident_file_bytes
from rewriter.cli.main import app
from rewriter.errors import OutputError, VerificationError
from rewriter.mixers.hybrid.hedgehog_window import HedgehogWindow
from rewriter.mixers.tokens import Tokens

POLICY = {"rules": [{"layers": [0], "use": "keep"}, {"use": "hedgehog_window"}]}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of bfloat16, several files, tied embeddings."""
    folder = tmp_path_factory.mktemp("streamed") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def command(*args: Any) -> Any:
    from typer.testing import CliRunner

    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(a) for a in args])


def policy_file(folder: Path) -> Path:
    path = folder / "policy.yaml"
    path.write_text("rules: [{layers: [0], use: keep}, {use: hedgehog_window}]\n")
    return path


def test_a_streamed_conversion_is_the_one_in_memory(sharded: Path, tmp_path: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(sharded).eval()
    torch.manual_seed(1)
    expected = rewriter.rewrite(whole, POLICY, verify="none")
    target = tmp_path / "out"
    torch.manual_seed(1)
    out = command(
        *("convert", sharded, "--policy", policy_file(tmp_path), "--out", target),
        *("--memory", "150 kB"),
    )
    assert out.exit_code == 0, out.stderr
    assert "module by module" in out.stdout and "the whole model was not run again" in out.stdout
    assert len(list(target.glob("*.safetensors"))) > 3
    loaded = rewriter.load(target)
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    ids = torch.arange(40)[None] % 128
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)


@linux
def test_pages_are_given_back(sharded: Path) -> None:
    source = open_checkpoint(sharded)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = source.model(input_ids=ids).logits
        pages = Pages(source.mapped_files, 0)
        assert pages.give_back() > 0
        assert pages.give_back() == 0  # nothing of them is resident now
        with pages.kept_within():
            assert torch.equal(source.model(input_ids=ids).logits, expected)
        assert pages.give_back() == 0
    assert resident_file_bytes() > 0  # the libraries


@linux
def test_what_was_written_to_is_kept(sharded: Path) -> None:
    source = open_checkpoint(sharded)
    weight = source.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.fill_(3.0)
    Pages(source.mapped_files, 0).give_back()
    assert bool((weight == 3.0).all())


def test_other_memory_is_left_alone(sharded: Path) -> None:
    own = torch.ones(1 << 16)
    assert Pages((), 0).give_back() == 0
    Pages((sharded / "config.json",), 0).give_back()
    assert bool((own == 1).all())


def test_inspecting_reads_no_large_weight(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "LARGE", 1 << 10)
    source = open_checkpoint(sharded)
    bare = source.skeleton
    assert "model" not in source.__dict__
    assert bare.dtype == torch.bfloat16
    assert float(bare.model.layers[1].mlp.up_proj.weight.detach().abs().sum()) == 0.0
    stored = source.model.model.layers[1].input_layernorm.weight
    assert torch.equal(bare.model.layers[1].input_layernorm.weight, stored)
    found, known = rewriter.inspect(bare), rewriter.inspect(source.model)
    assert found.sites == known.sites and found.mlps == known.mlps


def test_planning_reads_no_large_weight(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.checkpoint.weights import Weights

    def read(self: Weights) -> dict[str, torch.Tensor]:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Weights, "load", read)
    out = command("plan", sharded, "--policy", policy_file(tmp_path))
    assert out.exit_code == 0, out.stderr
    assert "3 sites" in out.stdout


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    text = index.read_text().splitlines()
    index.write_text("\n".join(x for x in text if f'"{name}"' not in x))


def _without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()


def _cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def _named_but_absent(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("layers.2.mlp.up_proj", "layers.2.mlp.left_proj"))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_without_a_tensor, "lacks the tensor"),
        (_without_a_shard, "is missing in"),
        (_cut_short, "truncated"),
        (_named_but_absent, "is not in"),
    ],
)
def test_damaged_files(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    policy = policy_file(tmp_path)
    commands = [
        ("inspect", folder),
        ("plan", folder, "--policy", policy),
        ("convert", folder, "--policy", policy, "--out", tmp_path / "out", "--memory", "1 kB"),
    ]
    for args in commands:
        out = command(*args)
        assert out.exit_code == 3, out.stderr
        assert part in out.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_converted_cannot_stay_in_their_files(
    sharded: Path, tmp_path: Path
) -> None:
    out = command(
        *("convert", sharded, "--policy", "identity", "--out", tmp_path / "out"),
        *("--memory", "1 kB", "--dtype", "float32"),
    )
    assert out.exit_code == 3
    assert "leave out --dtype, or raise --memory" in " ".join(out.stderr.split())


def test_no_size(sharded: Path, tmp_path: Path) -> None:
    out = command(
        *("convert", sharded, "--policy", "identity", "--out", tmp_path / "out"),
        *("--memory", "much"),
    )
    assert out.exit_code == 2 and "'much' is no size" in out.stderr


def test_a_failure_between_two_shards_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    model = rewriter.rewrite(open_checkpoint(sharded).model, "identity", verify="none")
    done: list[int] = []

    def full() -> None:
        done.append(1)
        if len(done) == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        save(model, tmp_path / "out", rewriter.plan_of(model), None, False, 60_000, full)
    assert len(done) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dim", "check"),
    [(2, "later tokens change no earlier output"), (0, "batch rows are independent")],
)
def test_module_checks_catch(
    sharded: Path, dim: int, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct = HedgehogWindow.mix

    def wrong(self: HedgehogWindow, x: Tokens) -> tuple[torch.Tensor, Any]:
        out, state = correct(self, x)
        return out + 0.1 * out.mean(dim, keepdim=True), state

    monkeypatch.setattr(HedgehogWindow, "mix", wrong)
    model = open_checkpoint(sharded).model
    with pytest.raises(VerificationError) as caught:
        rewriter.rewrite(model, POLICY, verify="layers")
    failed = {(r.check, r.subject) for r in caught.value.report.failures}  # type: ignore[attr-defined]
    assert (check, "model.layers.1.self_attn") in failed
    assert (check, "model.layers.2.self_attn") in failed
