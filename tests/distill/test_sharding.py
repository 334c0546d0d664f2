"""Sharded training: rows dealt out, identity without a process group, two processes as one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rewriter.distill import Rows, sharding
from rewriter.errors import UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp.py"


def test_one_process_changes_nothing() -> None:
    rows = Rows(torch.arange(12).view(3, 4))
    assert sharding.part(rows) == (rows, 1.0)
    assert sharding.mean([0.1, 2.0], torch.device("cpu")) == [0.1, 2.0]
    model = torch.nn.Linear(2, 2)
    before = list(model.parameters())
    sharding.shard(model, ["weight"])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert sharding.whole(before[0]) is before[0]
    assert sharding.as_sharded(before[0], before[1]) is before[0]


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


@pytest.mark.usefixtures("second_of_two")
def test_rows_are_dealt_out() -> None:
    ids = torch.arange(8).view(4, 2)
    mine, weight = sharding.part(Rows(ids))
    assert torch.equal(mine.ids, ids[1::2])
    assert weight == 1.0
    # The mean over tokens of the whole batch: this process has 3 of its 4 tokens.
    mask = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]])
    mine, weight = sharding.part(Rows(ids, mask))
    assert mine.mask is not None
    assert torch.equal(mine.mask, mask[1::2])
    assert weight == 2 * 3 / 4


ORDER = """
import torch
from rewriter.distill import sharding, trainer
class Stage:
    core, rates, body = {"w": torch.nn.Parameter(torch.zeros(2))}, {"w": 1.0}, {}
    groups = [["w"]]
masters = trainer.Masters(Stage(), 0.1, 0.1)
masters.live["w"].grad = torch.ones(2)
masters.step(0, {0.1: 0.1}, None)
saved = {name: tensor.detach().clone() for name, tensor in masters.state().items()}
names = {tuple(saved[f"{n}.w"].tolist()): n for n in ("value", "exp_avg", "exp_avg_sq")}
def note(tensor, like):
    print(names[tuple(tensor.tolist())])
    return tensor
sharding.as_sharded = note
masters.load(saved)
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_state_is_dealt_out_in_the_same_order_by_every_process(seed: str) -> None:
    # Each process has its own order of sets, and the collectives of a load are matched by order.
    words = [sys.executable, "-c", ORDER]
    hashing = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=hashing)
    assert done.stdout.split() == ["value", "exp_avg", "exp_avg_sq"]


@pytest.mark.usefixtures("second_of_two")
def test_rows_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple"):
        sharding.part(Rows(torch.zeros(3, 2, dtype=torch.int64)))


@pytest.mark.nightly
@pytest.mark.parametrize("train", ["core", "lora", "all"])
def test_two_processes_train_as_one(train: str) -> None:
    words = [sys.executable, str(EXAMPLE), "--train", train, "--steps", "4"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    text = " ".join(done.stdout.split())
    found = re.findall(r"largest difference (\S+);", text)
    assert len(found) == 2
    assert all(float(gap) < 1e-3 for gap in found)
