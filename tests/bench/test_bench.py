"""The benchmark's own arithmetic: rounds, ratios, crossovers, memory, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rewriter.bench.machine import Machine, this_machine
from rewriter.bench.memory import peak_bytes
from rewriter.bench.plot import draw
from rewriter.bench.run import Options, Point, Table, chosen, run
from rewriter.cli.main import app
from rewriter.errors import UsageError
from rewriter.timing import interleaved

MACHINE = Machine("a processor", ("avx2",), 2, 1, "2.13")


def point(length: int, ratio: float) -> Point:
    seconds = {"ours": 1.0, "sdpa": ratio}
    return Point(
        "dense", "dense", length, "float32", False, "cpu", (), seconds, "sdpa", ratio, 1.0, None
    )


def table(*ratios: tuple[int, float]) -> Table:
    return Table(MACHINE, Options(), tuple(point(n, r) for n, r in ratios))


def test_every_contender_runs_in_every_round() -> None:
    calls: list[str] = []
    work = {n: lambda n=n: (calls.append(n), sum(range(30_000))) for n in ("a", "b")}
    timings = interleaved(work, seconds=0.0, rounds=(4, 9))
    assert {t.samples for t in timings.values()} == {4}
    assert calls[4:] == ["a", "b"] * 4  # after a warm-up and a first look at each
    assert all(0 < t.least <= t.median for t in timings.values())


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1

    timing = interleaved({"short": run}, seconds=0.0, rounds=(3, 3))["short"]
    assert count > 100
    assert timing.median < 1e-4


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        (((256, 2.0), (512, 3.0)), 0.0),
        (((256, 0.5), (1024, 1.5)), 512.0),
        (((256, 2.0), (512, 0.5), (1024, 2.0)), 512 * 2 ** (1 / 3)),
        (((256, 0.5), (512, 0.9)), None),
        ((), None),
    ],
)
def test_crossover(ratios: tuple[tuple[int, float], ...], expected: float | None) -> None:
    got = table(*ratios).crossover("dense")
    assert got == (expected if expected is None else pytest.approx(expected))


def test_memory_of_a_known_allocation() -> None:
    size = 64 * 2**20

    def allocate() -> None:
        torch.ones(size // 4)

    peak = peak_bytes(allocate)
    if peak is None:
        pytest.skip("this system does not say its peak memory")
    assert 0.9 * size < peak < 1.5 * size


def test_the_machine_is_named() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.torch in machine.describe()


def test_a_point_is_measured_and_drawn(tmp_path: Path) -> None:
    options = Options(
        only=("ssd",), lengths=(32,), seconds=0.0, compiled=False, heads=2, kv_heads=1
    )
    measured = run(options)
    (only,) = measured.points
    assert {"ours", "sdpa", "torch form"} == set(only.seconds)
    assert only.ratio == pytest.approx(only.seconds["sdpa"] / only.seconds["ours"])
    assert only.gflops > 0
    assert json.loads(measured.to_json())["points"][0]["case"] == "ssd"
    draw(measured, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(UsageError, match=r"nonesuch.*dense"):
        chosen(("nonesuch",))


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--only", "recurrent_step", "--lengths", "8", "--seconds", "0", "--no-compiled"]
    result = CliRunner().invoke(app, ["bench", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["points"][0]["case"] == "recurrent_step"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lengths", "0"], "positive numbers"),
        (["--lengths", "a,b"], "positive numbers"),
        (["--dtype", "float8"], "--dtype is one of"),
        (["--clock", "sun"], "--clock is one of"),
        (["--heads", "6", "--kv-heads", "4"], "evenly"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
        (["--only", "nonesuch"], "nonesuch"),
    ],
)
def test_bad_requests(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2
    assert sentence in " ".join((result.output + capsys.readouterr().err).split())
