"""The Triton backend without a GPU; the interpreter's tests run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch

from rewriter.backends.triton import block_sparse, decode, emit, launch, recurrence
from rewriter.backends.triton.predicate import printed
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.mask import I, J
from rewriter.ir.recurrence import Recurrence

pytest.importorskip("triton")
HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "triton_resources.json"

# A few kernels of every kind that compile fast; the whole table is compared at night.
SAMPLE = (
    "token decay/64/outputs/sm_90",
    "token decay/64/states/gfx942",
    "delta, token decay/64/solve/sm_80",
    "causal attention/64/attend/sm_90",
    "decode/128/split/gfx942",
)


def interpreted(*options: str) -> subprocess.CompletedProcess[str]:
    """The tests of `interpreted` in a process that interprets kernels."""
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("chosen", ["recurrence", "not recurrence"])
def test_under_the_interpreter(chosen: str) -> None:
    result = interpreted("-k", chosen.replace("recurrence", "test_interpreted_recurrence"))
    assert result.returncode == 0, result.stdout[-6000:]


@pytest.mark.nightly
def test_long_under_the_interpreter() -> None:
    result = interpreted("-m", "nightly")
    assert result.returncode == 0, result.stdout[-6000:]


def test_resources_of_a_sample() -> None:
    compare(SAMPLE)


@pytest.mark.nightly
def test_resources_of_all() -> None:
    from rewriter.backends.triton.shipped import rows

    compare(tuple(row.key for row in rows()))
    assert {row.key for row in rows()} == set(json.loads(TABLE.read_text()))


def compare(keys: tuple[str, ...]) -> None:
    """Recompile, and find the committed figures and nothing that must not be shipped."""
    from dataclasses import asdict

    from rewriter.backends.triton.shipped import rows

    committed = json.loads(TABLE.read_text())
    met = set()
    for row in rows(keys):
        found = row.resources()
        assert row.problem(found) is None, row.key
        assert asdict(found) == committed[row.key], row.key
        met.add(row.key)
    assert met == set(keys)


def test_declines() -> None:
    bf16 = torch.bfloat16
    assert recurrence.decline(Recurrence(64, 64, decay="token"), bf16, True) is None
    assert block_sparse.decline(BlockSparse(64, 64, 0.1), bf16, True) is None
    assert decode.decline(Decode(64, 64, 0.1), bf16, False) is None
    for reason in (
        recurrence.decline(Recurrence(64, 64), torch.float64, False),
        recurrence.decline(Recurrence(512, 64), bf16, False),
        recurrence.decline(Recurrence(64, 64, normaliser="max"), bf16, False),
        recurrence.decline(Recurrence(64, 64, correction="untied"), bf16, True),
        block_sparse.decline(BlockSparse(64, 64, 0.1, block=24), bf16, False),
        decode.decline(Decode(64, 64, 0.1), bf16, True),
    ):
        assert reason


def test_declines_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    reason = recurrence.decline(Recurrence(64, 64), torch.float32, False)
    assert reason is not None and "pip install" in reason


def test_tuning_starts_from_the_fixed_choice() -> None:
    made = launch.Launch(None, (1,), {}, {}, warps=4, stages=2)
    options = launch.candidates(made)
    assert options[0] == (4, 2)
    assert len(set(options)) == len(options) == 9


def test_importing_does_not_import_triton() -> None:
    code = (
        "import sys, rewriter.backends.triton.recurrence, rewriter.backends.triton.block_sparse, "
        "rewriter.backends.triton.decode, rewriter.backends.triton.ahead\n"
        "sys.exit('rewriter_generated' in str(sys.modules) or 'triton.language' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_emitted_files_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit, "cache_directory", lambda kind: tmp_path)
    text = emit.render("recurrence_prefix", channel=False, exclusive=False, packed=False)
    compile(text, "prefix", "exec")
    first = emit.load("prefix", text)
    (path,) = tmp_path.iterdir()
    path.write_text("broken")
    sys.modules.pop(first.__name__)
    emit.load("prefix", text)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.glob("*.py")] == [path.name]


def test_predicates_round_down() -> None:
    """`//` and `%` of a GPU round towards zero; the printed form must not depend on it."""
    text = printed(sympy.Eq(sympy.Mod(I - J, 3), 0) & (sympy.floor((I - J) / 4) < 1)).text
    assert text is not None
    for i in range(12):
        for j in range(12):
            for values in ({"i": i, "j": j, "h": 0}, {"i": Cut(i), "j": Cut(j), "h": 0}):
                want = (i - j) % 3 == 0 and (i - j) // 4 < 1
                assert bool(eval(text, values)) == want


class Cut(int):
    """An integer whose division rounds towards zero."""

    def __sub__(self, other: int) -> Cut:
        return Cut(int(self) - int(other))

    def __add__(self, other: int) -> Cut:
        return Cut(int(self) + int(other))

    __radd__ = __add__

    def __mul__(self, other: int) -> Cut:
        return Cut(int(self) * int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Cut:
        return Cut(int(int(self) / int(other)))

    def __mod__(self, other: int) -> Cut:
        return Cut(int(self) - int(other) * int(int(self) / int(other)))
