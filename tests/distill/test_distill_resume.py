from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_standin import tiny_student, tiny_teacher, token_rows
from safetensors.torch import load_file, save_file

from rewriter.distill import Progress, Rows, Silent, distill, parse_config
from rewriter.distill import resume as resume_module
from rewriter.errors import InputError, OutputError, UsageError

CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "length": 24,
    "checkpoint_every": 3,
    "layers": {"steps": 7, "batch": 2, "accumulate": 2},
    "logits": {"steps": 8, "batch": 2, "train": "lora", "ce": 0.2},
}

# One process imports everything and forks a child for every attempt; each child is a process of
# its own, and most of them die by SIGKILL.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill_standin import tiny_student, tiny_teacher, token_rows
from rewriter.distill import Rows, Silent, distill, parse_config

torch.set_num_threads(1)
config = parse_config(json.loads(sys.argv[1]))


def attempt(folder, result, stage, step, where):
    class KillAt(Silent):
        def update(self, progress):
            if where == "step" and (progress.stage, progress.step) == (stage, step):
                os.kill(os.getpid(), signal.SIGKILL)

    rename = Path.replace

    def replace(self, target):
        if where == "write" and Path(target).name == f"{stage}-{step:06d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    rename_of_part = Path.rename

    def rename_part(self, target):
        if where == "part" and Path(target).name.startswith("part-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename_of_part(self, target)

    Path.replace, Path.rename = replace, rename_part
    teacher = tiny_teacher()
    student = tiny_student(teacher)
    distill(
        teacher, student, Rows(token_rows()), config, folder=folder or None, reporter=KillAt()
    )
    save_file({n: p.detach().contiguous() for n, p in student.named_parameters()}, result)


for arguments in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        attempt(*arguments)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    folder = Path(arguments[0])
    left = sorted(p.name for p in folder.iterdir()) if arguments[0] else []
    sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), left]) + "\\n")
    sys.stdout.flush()
"""


def test_killed_runs_end_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    folder, whole, resumed = (str(tmp_path / n) for n in ("checkpoints", "whole", "resumed"))
    attempts = [
        ("", whole, "", 0, ""),
        (folder, resumed, "layers", 5, "step"),  # between two checkpoints
        (folder, resumed, "layers", 6, "write"),  # while a checkpoint is being written
        (folder, resumed, "logits", 4, "step"),
        (folder, resumed, "", 0, ""),
    ]
    codes, left = killed(CONFIG, attempts, tmp_path)
    assert left[1] == ["layers-000003"]
    assert len(left[2]) == 2 and left[2][0].endswith(".tmp") and left[2][1] == "layers-000003"
    assert left[3] == ["layers-000007", "logits-000003"]
    assert left[4] == ["logits-000006", "logits-000008"]
    assert codes == (0, -signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0)
    assert_equal(whole, resumed)


def test_killed_runs_from_disk_end_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    folder, whole, resumed = (str(tmp_path / n) for n in ("checkpoints", "whole", "resumed"))
    attempts = [
        ("", whole, "", 0, ""),
        (folder, resumed, "", 0, "part"),  # while activations are being written
        (folder, resumed, "layers", 5, "step"),  # in the first layer
        (folder, resumed, "layers", 7, "write"),  # at its end
        (folder, resumed, "layers", 12, "step"),  # in the second one
        (folder, resumed, "logits", 4, "step"),
        (folder, resumed, "", 0, ""),
    ]
    layers = {**CONFIG["layers"], "stored": True}
    codes, left = killed({**CONFIG, "layers": layers}, attempts, tmp_path)
    assert codes == (0, *(-signal.SIGKILL,) * 5, 0)
    assert left[1] == ["activations"] and left[2] == ["activations", "layers-000003"]
    assert left[4] == ["activations", "layers-000007", "layers-000010"]
    assert left[6] == ["logits-000006", "logits-000008"]
    assert_equal(whole, resumed)


def killed(config: Any, attempts: Any, tmp_path: Path) -> tuple[Any, Any]:
    """Exit codes of the attempts, and what each left in its folder."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config), json.dumps(attempts)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    codes, left = zip(*(json.loads(line) for line in done.stdout.splitlines()), strict=True)
    return codes, left


def assert_equal(whole: str, resumed: str) -> None:
    first, second = load_file(whole), load_file(resumed)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    projection = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[projection], tiny_teacher().get_parameter(projection))


def attempt(folder: Path, **changes: Any) -> None:
    teacher = tiny_teacher()
    config = parse_config({**CONFIG, **changes})
    distill(teacher, tiny_student(teacher), Rows(token_rows()), config, folder=folder)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    attempt(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logits-000006", "logits-000008"]
    attempt(tmp_path, checkpoint_every=5)  # how often is not part of the identity
    with pytest.raises(UsageError, match="run with another config"):
        attempt(tmp_path, seed=3)


def test_unreadable_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    attempt(tmp_path)
    state = tmp_path / "logits-000008" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"logits-000008.*cannot be read"):
        attempt(tmp_path)


def test_failed_write_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume_module, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        attempt(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_resumes_on_the_same_objects(tmp_path: Path) -> None:
    class Interrupt(Silent):
        def update(self, progress: Progress) -> None:
            if progress.stage == "logits" and progress.step == 5:
                raise KeyboardInterrupt

    teacher = tiny_teacher()
    student, other = tiny_student(teacher), tiny_student(teacher)
    rows, config = Rows(token_rows()), parse_config(CONFIG)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student, rows, config, folder=tmp_path, reporter=Interrupt())
    result = distill(teacher, student, rows, config, folder=tmp_path)
    assert [stage.name for stage in result.stages] == ["logits"]
    distill(teacher, other, rows, config)
    for name, value in other.named_parameters():
        assert torch.equal(student.get_parameter(name), value), name


def test_a_stage_that_was_done_before_has_no_loss_to_print(tmp_path: Path) -> None:
    class Lines(Silent):
        def message(self, text: str) -> None:
            said.append(text)

    teacher = tiny_teacher()
    rows, config = Rows(token_rows()), parse_config(CONFIG)
    distill(teacher, tiny_student(teacher), rows, config, folder=tmp_path)
    said: list[str] = []
    distill(teacher, tiny_student(teacher), rows, config, folder=tmp_path, reporter=Lines())
    assert said[-1].endswith("done before") and "nan" not in " ".join(said)
