"""Writes that fail or are killed leave the old checkpoint or the new one, and nothing beside it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from checkpoint_stubs import apply_plan, edit_json, rewritten_llama, tiny_llama, tokens
from safetensors import SafetensorError

from rewriter import atomic
from rewriter.checkpoint import load, save, write
from rewriter.checkpoint.manifest import FORMAT, MANIFEST
from rewriter.errors import InputError, OutputError, RewriterError
from rewriter.plan import Plan

pytestmark = pytest.mark.usefixtures("stub_mixers")


@pytest.fixture
def model() -> torch.nn.Module:
    return rewritten_llama()[0]


@pytest.fixture
def plan() -> Plan:
    return rewritten_llama()[1]


def refused(kind: type[RewriterError], action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(RewriterError) as caught:
        action()
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def in_child(action: Callable[[], object]) -> str:
    """Run in a forked process; the text of its exception, '' if none, 'killed' if it was killed."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            action()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    return "killed" if os.WIFSIGNALED(status) else text


# ---- failing writes ------------------------------------------------------------------------------


def test_file_size_limit(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save(model, tmp_path / "out", plan)

    text = in_child(limited)
    assert text.startswith("OutputError: cannot write")
    assert "would exceed the size limit" in text
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "part"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota is used up")]
)
@pytest.mark.parametrize("where", ["weights", "manifest"])
def test_disk_full(
    tmp_path: Path,
    model: torch.nn.Module,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    part: str,
    where: str,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> NoReturn:
        if where == "weights":
            text = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
            raise SafetensorError(text)
        raise OSError(code, os.strerror(code))

    if where == "weights":
        monkeypatch.setattr(write, "save_file", fails)
    else:
        monkeypatch.setattr(Path, "write_bytes", fails)
    refused(OutputError, lambda: save(model, tmp_path / "a" / "out", plan), "a/out", part)
    assert names(tmp_path) == []


def test_full_disk_is_seen_before_writing(
    tmp_path: Path, model: torch.nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(OutputError, lambda: save(model, tmp_path / "out", plan), "the disk is full")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "part"),
    [(errno.EROFS, "file system is read-only"), (errno.EACCES, "permission denied")],
)
def test_target_not_writable(
    tmp_path: Path,
    model: torch.nn.Module,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    part: str,
) -> None:
    def fails(self: Path, *args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(code, os.strerror(code), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fails)
        refused(OutputError, lambda: save(model, tmp_path / "out", plan), "out", part)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> None:
    tmp_path.chmod(0o555)
    try:
        refused(OutputError, lambda: save(model, tmp_path / "out", plan), "permission denied")
    finally:
        tmp_path.chmod(0o755)
    assert names(tmp_path) == []


def test_target_exists(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> None:
    save(model, tmp_path / "out", plan)
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    refused(OutputError, lambda: save(model, tmp_path / "out", plan), "out already exists")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    assert names(tmp_path) == ["out"]


def test_other_things_are_never_overwritten(
    tmp_path: Path, model: torch.nn.Module, plan: Plan
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    target = tmp_path / "photos"
    refused(OutputError, lambda: save(model, target, plan, overwrite=True), "holds no checkpoint")
    assert names(target) == ["a.jpg"]


def test_target_is_a_file_or_below_one(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> None:
    (tmp_path / "f").write_text("x")
    refused(OutputError, lambda: save(model, tmp_path / "f", plan), "there is a file of that name")
    refused(OutputError, lambda: save(model, tmp_path / "f" / "out", plan), "cannot write")
    assert names(tmp_path) == ["f"]


def test_empty_directory_is_filled(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> None:
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out", plan)
    assert names(tmp_path) == ["out"]


def test_interrupt_leaves_nothing(
    tmp_path: Path, model: torch.nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out", plan)
    assert names(tmp_path) == []


# ---- kills ---------------------------------------------------------------------------------------


def outputs(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(path, apply_plan=apply_plan)(tokens()).logits


def test_killed_between_shards_leaves_no_target_and_the_next_save_cleans_up(
    tmp_path: Path, model: torch.nn.Module, plan: Plan
) -> None:
    def action() -> None:
        real, calls = write.save_file, iter(range(9))

        def dies(*args: Any, **kwargs: Any) -> None:
            if next(calls) == 1:
                kill()
            real(*args, **kwargs)

        write.save_file = dies
        save(model, tmp_path / "out", plan, max_shard_bytes=10_000)

    assert in_child(action) == "killed"
    (left,) = names(tmp_path)
    assert left.startswith(".out.partial-")
    refused(InputError, lambda: load(tmp_path / "out"), "out does not exist")
    save(model, tmp_path / "out", plan)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_overwriting_leaves_old_or_new(
    tmp_path: Path, model: torch.nn.Module, plan: Plan, moment: str
) -> None:
    save(model, tmp_path / "out", plan)
    old = outputs(tmp_path / "out")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(3)
        new = model(tokens()).logits

    def action() -> None:
        real = atomic._publish

        def dies(partial: Path, target: Path) -> None:
            if moment == "after":
                real(partial, target)
            kill()

        atomic._publish = dies
        save(model, tmp_path / "out", plan, overwrite=True)

    assert in_child(action) == "killed"
    assert torch.equal(outputs(tmp_path / "out"), old if moment == "before" else new)
    save(model, tmp_path / "out", plan, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert torch.equal(outputs(tmp_path / "out"), new)


def test_without_an_atomic_exchange_a_kill_between_the_renames_is_repaired(
    tmp_path: Path, model: torch.nn.Module, plan: Plan
) -> None:
    save(model, tmp_path / "out", plan)
    old = outputs(tmp_path / "out")

    def action() -> None:
        def dies(self: Path, target: Path) -> None:
            os.rename(self, target)  # noqa: PTH104 - the method is what is replaced
            kill()

        atomic._exchange = lambda first, second: False
        Path.rename = dies  # type: ignore[assignment, method-assign]
        save(model, tmp_path / "out", plan, overwrite=True)

    assert in_child(action) == "killed"
    assert not (tmp_path / "out").exists()
    refused(OutputError, lambda: save(model, tmp_path / "out", plan), "already exists")
    assert names(tmp_path) == ["out"]
    assert torch.equal(outputs(tmp_path / "out"), old)


def test_overwriting_without_an_atomic_exchange(
    tmp_path: Path, model: torch.nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    save(model, tmp_path / "out", plan)
    save(model, tmp_path / "out", plan, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_partial_directory_of_a_living_writer_is_left_alone(
    tmp_path: Path, model: torch.nn.Module, plan: Plan
) -> None:
    with atomic.directory(tmp_path / "out") as busy:
        save(model, tmp_path / "out2", plan)
        atomic._remove_stale(tmp_path / "out")
        assert busy.is_dir()
    assert names(tmp_path) == ["out", "out2"]


# ---- damaged rewritten checkpoints ---------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, model: torch.nn.Module, plan: Plan) -> Path:
    return save(model, tmp_path / "out", plan)


def refused_load(saved: Path, *parts: str) -> None:
    refused(InputError, lambda: load(saved, apply_plan=apply_plan), *parts)


def test_manifest_removed(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    refused_load(saved, "has lost its rewriter.json", "convert again")


def test_manifest_edited(saved: Path) -> None:
    edit_json(saved / MANIFEST, original="renamed")
    refused_load(saved, MANIFEST, "was changed after it was written", "verify_hashes=False")


def test_weights_edited(saved: Path) -> None:
    path = saved / "rewritten-00001-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    refused_load(saved, path.name, "sha256 differs")
    load(saved, verify_hashes=False, apply_plan=apply_plan)


def test_weights_truncated_or_gone(saved: Path) -> None:
    path = saved / "rewritten-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused_load(saved, path.name, "truncated")
    path.unlink()
    refused_load(saved, f"weight file {path} is missing")


def test_newer_format(saved: Path) -> None:
    edit_json(saved / MANIFEST, format=FORMAT + 1, surprise=True)
    refused_load(saved, "newer version", "upgrade attention-rewriter")


def test_manifest_with_an_unknown_mixer(saved: Path) -> None:
    path = saved / MANIFEST
    path.write_text(path.read_text().replace('"target": "keep"', '"target": "warp"'))
    action = lambda: load(saved, verify_hashes=False, apply_plan=apply_plan)  # noqa: E731
    refused(InputError, action, "unknown mixer 'warp'", "package of that mixer")


def test_manifest_with_a_foreign_key(saved: Path) -> None:
    edit_json(saved / MANIFEST, aliass={})
    action = lambda: load(saved, verify_hashes=False, apply_plan=apply_plan)  # noqa: E731
    refused(InputError, action, MANIFEST, "unknown key 'aliass'; did you mean 'aliases'?")


def test_weights_of_another_model(saved: Path) -> None:
    config = saved / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    refused_load(saved, "lacks 'model.layers.2.")


def test_ordinary_checkpoint_is_not_rewritten(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    refused_load(tmp_path / "plain", "is not a rewritten checkpoint")


def test_module_without_a_config_asks_for_its_base(tmp_path: Path) -> None:
    save(torch.nn.Linear(2, 2), tmp_path / "out", Plan())
    refused_load(tmp_path / "out", "Linear", "pass the original model as base=")
