"""Stage 1 from activations on disk is the ordinary stage 1."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_standin import VOCABULARY, tiny_student, tiny_teacher, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import BertConfig, BertModel

from rewriter import rewrite
from rewriter.checkpoint import open_checkpoint
from rewriter.checkpoint.paging import Pages
from rewriter.distill import (
    Progress,
    Rows,
    Silent,
    activations,
    distill,
    parse_config,
    stored,
    teaching,
)
from rewriter.distill.calls import described, restored
from rewriter.distill.copies import core_names
from rewriter.distill.shards import MappedShard, ShardWriter
from rewriter.errors import InputError, OutputError, UsageError

LAYERS = {"steps": 7, "batch": 2, "accumulate": 2}
CONFIG = {"dtype": "float32", "length": 24, "checkpoint_every": 3}


def run(
    student: Any, teacher: Any, rows: Rows, layers: dict[str, Any], **more: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    student = copy.deepcopy(student)
    config = parse_config({**CONFIG, "layers": {**LAYERS, **layers}, **more.pop("config", {})})
    (result,) = distill(teacher, student, rows, config, **more).stages
    return result, {name: student.get_parameter(name).detach() for name in core_names(student)}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("layers", [{}, {"batch": 1, "steps": 20, "accumulate": 1}])
@pytest.mark.parametrize("padded", [False, True])
def test_the_result_is_that_of_the_ordinary_stage(layers: dict[str, Any], padded: bool) -> None:
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    ids = token_rows()
    mask = torch.ones_like(ids)
    mask[::2, 18:] = 0
    rows = Rows(ids, mask if padded else None)
    plain, wanted = run(student, teacher, rows, layers)
    result, weights = run(student, teacher, rows, {**layers, "stored": True})
    assert_same(wanted, weights)
    assert (result.steps, result.tokens) == (plain.steps, plain.tokens)
    assert result.first == pytest.approx(plain.first) and result.last == pytest.approx(plain.last)
    assert result.parts == pytest.approx(plain.parts)


def test_an_encoder_with_padding_and_attention_losses() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    teacher = BertModel(config).eval()
    policy = {"name": "test", "rules": [{"use": "hedgehog"}]}
    student = rewrite(teacher, policy, verify="none", force=True)
    ids = token_rows(8, 16)
    mask = torch.ones_like(ids)
    mask[::2, 12:] = 0
    layers = {"attention": "cross_entropy"}
    wanted = run(student, teacher, Rows(ids, mask), layers)[1]
    assert_same(wanted, run(student, teacher, Rows(ids, mask), {**layers, "stored": True})[1])


def test_a_module_that_runs_several_times() -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
    )
    teacher = AlbertModel(config).eval()
    policy = {"name": "test", "rules": [{"use": "hedgehog"}]}
    student = rewrite(teacher, policy, verify="none", force=True)
    rows = Rows(token_rows(8, 16))
    wanted = run(student, teacher, rows, {})[1]
    assert_same(wanted, run(student, teacher, rows, {"stored": True})[1])


def test_a_mixer_that_drops_its_window_trains_from_disk() -> None:
    teacher = tiny_teacher()
    policy = {"rules": [{"use": "hedgehog_window", "options": {"window": 4, "sinks": 1}}]}
    student = rewrite(teacher, policy, verify="none", force=True)
    layers = {"drop_window": 0.5, "stored": True}
    first = run(student, teacher, Rows(token_rows()), layers)[1]
    assert_same(first, run(student, teacher, Rows(token_rows()), layers)[1])


def test_little_disk_means_more_passes_of_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    wanted = run(student, teacher, rows, {})[1]
    lines = Lines()
    layers = {"stored": {"disk": "260 kB", "folder": str(tmp_path / "kept")}}
    assert_same(wanted, run(student, teacher, rows, layers, reporter=lines)[1])
    assert any("in 2 passes of the teacher" in line for line in lines.said), lines.said
    assert sum("modules stored" in line for line in lines.said) == 2
    again = Lines()
    layers["stored"] = {"folder": str(tmp_path / "kept")}
    assert_same(wanted, run(student, teacher, rows, layers, reporter=again)[1])
    assert not any("modules stored" in line for line in again.said)
    (path, *_) = sorted((tmp_path / "kept").rglob("*.safetensors"))
    with safe_open(path, "pt") as file:  # the format's own reader takes it
        assert any(file.get_tensor(name).shape == (2, 24, 32) for name in file.keys())  # noqa: SIM118


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


class Stop(Silent):
    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, progress: Progress) -> None:
        if progress.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 5, 7, 9, 14])
def test_a_run_that_was_stopped_while_layers_train_goes_on(step: int, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    logits = {"config": {"logits": {"steps": 2, "train": "core"}}}
    layers = {"stored": True}
    whole, resumed = copy.deepcopy(student), copy.deepcopy(student)
    config = parse_config({**CONFIG, "layers": {**LAYERS, **layers}, **logits["config"]})
    distill(teacher, whole, rows, config)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, resumed, rows, config, folder=tmp_path, reporter=Stop(step))
    assert (tmp_path / teaching.FOLDER).is_dir()
    lines = Lines()
    resumed = copy.deepcopy(student)
    distill(teacher, resumed, rows, config, folder=tmp_path, reporter=lines)
    assert not any("modules stored" in line for line in lines.said)
    for name in core_names(whole):
        assert torch.equal(whole.get_parameter(name), resumed.get_parameter(name)), name
    assert not (tmp_path / teaching.FOLDER).exists()


@pytest.mark.parametrize("batch", [0, 3, 13])
def test_a_run_that_was_stopped_while_the_teacher_runs_goes_on(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    wanted = run(student, teacher, rows, {})[1]
    monkeypatch.setattr(activations, "PART_BYTES", 60_000)
    count = 0
    visit = activations.Originals.visit

    def stopping(self: Any, rows: Rows, look: Any) -> Any:
        nonlocal count
        count += 1
        if count == batch + 2:  # the first forward only measures
            raise KeyboardInterrupt
        return visit(self, rows, look)

    with monkeypatch.context() as patch:
        patch.setattr(activations.Originals, "visit", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(student, teacher, rows, {"stored": True}, folder=tmp_path)
    parts = list(tmp_path.rglob("part-*"))
    assert bool(parts) == (batch >= 3)
    stamps = {p: p.stat().st_mtime_ns for p in parts}
    kept: list[bool] = []
    remove = activations.Activations.remove

    def watched(self: Any) -> None:
        kept.extend(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
        remove(self)

    monkeypatch.setattr(activations.Activations, "remove", watched)
    assert_same(wanted, run(student, teacher, rows, {"stored": True}, folder=tmp_path)[1])
    assert all(kept) and len(kept) == len(parts)


def test_only_one_layer_of_the_student_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    seen: list[list[str]] = []
    made = stored.MatchLayers

    def watched(*args: Any) -> Any:
        stage = made(*args)
        seen.append([path for path, m in stage.student.named_modules() if hasattr(m, "core")])
        return stage

    monkeypatch.setattr(stored, "MatchLayers", watched)
    run(tiny_student(teacher), teacher, Rows(token_rows()), {"stored": True})
    assert seen == [["model.layers.0.self_attn"], ["model.layers.1.self_attn"]]


def test_what_cannot_be_stored_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    for wrong in ({"steps": None, "max_seconds": 9.0}, {"max_seconds": 9.0}):
        with pytest.raises(UsageError, match="'stored' needs 'steps' and no 'max_seconds'"):
            run(student, teacher, rows, {"stored": True, **wrong})
    with pytest.raises(UsageError, match="'much' is no size"):
        run(student, teacher, rows, {"stored": {"disk": "much"}})
    layers = {"stored": {"disk": "10 kB", "folder": str(tmp_path / "x")}}
    # 14 batches of 2 x 24 x 32 inputs and outputs, rotary tables of 24 x 8, and 24 positions
    with pytest.raises(OutputError, match=r"take 196\.2 kB on disk and 10\.0 kB may be used"):
        run(student, teacher, rows, layers)
    shared = copy.deepcopy(student)
    first, second = (layer.self_attn.core for layer in shared.model.layers)
    second.key_map = first.key_map
    with pytest.raises(UsageError, match="share new parameters"):
        stored._check(shared, {p: [f"{p}.core.key_map"] for p in paths_of(shared)})
    with pytest.raises(UsageError, match="learns inside 'model'"):
        stored._check(shared, {"model": [], "model.layers": []})
    with pytest.raises(UsageError, match="nothing to match"):
        stored._check(shared, {})
    monkeypatch.setattr(stored, "size", lambda: 2)
    with pytest.raises(UsageError, match="in one process only"):
        run(student, teacher, rows, {"stored": True})


def paths_of(student: Any) -> list[str]:
    return [path for path, module in student.named_modules() if hasattr(module, "core")]


def test_a_damaged_part_is_one_clear_error(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    layers = {"stored": {"folder": str(tmp_path)}}
    run(student, teacher, rows, layers)
    (index,) = tmp_path.rglob("index.json")
    index.write_text("{")
    with pytest.raises(InputError, match="delete that folder"):
        run(student, teacher, rows, layers)


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.sampled_from(["tensor", "dict", "list", "a"]), inner)
        ),
        max_leaves=8,
    )
)
def test_arguments_come_back(value: Any) -> None:
    import json

    document = json.loads(json.dumps(described(value, lambda t: None)))
    assert restored(document, lambda place: torch.empty(0)) == value


def test_tensors_come_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer, base = ShardWriter(path), torch.randn(3, 5, dtype=torch.float64)
    tensors = [
        base.to(torch.bfloat16),
        base.t(),
        torch.tensor(3),
        torch.zeros(0, 4),
        base > 0,
        base[:1].expand(7, 5),
    ]
    documents = [described(t, writer.add) for t in tensors]
    writer.close()
    shard = MappedShard(path)
    for document, tensor in zip(documents, tensors, strict=True):
        back = restored(document, shard.tensor)
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype
        assert back.data_ptr() % 64 == 0 or back.numel() == 0
    assert documents[-1]["shape"] == [7, 5]
    first = restored(documents[0], shard.tensor)
    first.zero_()  # in memory alone
    shard.give_back()
    assert torch.equal(restored(documents[0], shard.tensor), tensors[0])
    with pytest.raises(UsageError, match="a device, which cannot"):
        described({"x": torch.device("cpu")}, writer.add)
    with pytest.raises(UsageError, match="complex64"):
        ShardWriter(tmp_path / "y").add(torch.zeros(1, dtype=torch.complex64))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_a_teacher_whose_weights_stay_in_their_files(tmp_path: Path) -> None:
    tiny_teacher().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source = open_checkpoint(tmp_path / "model")
    teacher, rows = source.model, Rows(token_rows())
    student = tiny_student(teacher)
    wanted = run(student, teacher, rows, {})[1]
    pages = Pages(source.mapped_files, 0)
    with pages.kept_within():
        assert_same(wanted, run(student, teacher, rows, {"stored": True})[1])
    assert pages.give_back() == 0  # nothing of the files is resident, so nothing was copied


def test_a_stage_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student, rows = tiny_student(teacher), Rows(token_rows())
    layers, lines = {"stored": True}, Lines()
    first = run(student, teacher, rows, layers, folder=tmp_path)[1]
    result, second = run(student, teacher, rows, layers, folder=tmp_path, reporter=lines)
    assert_same(first, second)
    assert result.steps == 7 and lines.said[-1].endswith("done before")
    with pytest.raises(UsageError, match="another config"):  # its checkpoints are others
        run(student, teacher, rows, {}, folder=tmp_path)


def test_the_settings_survive_a_file() -> None:
    wanted = parse_config({"layers": {"steps": 3, "stored": {"disk": "2 GB"}}})
    assert parse_config(wanted.model_dump(mode="json")) == wanted
    plain = parse_config({"layers": {"steps": 3, "stored": False}})
    assert plain.layers is not None and plain.layers.stored is None
    switched = parse_config({"layers": {"steps": 3, "stored": True}})
    assert switched.layers is not None and switched.layers.stored is not None
