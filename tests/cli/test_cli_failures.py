"""Exit codes and error lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import failed, run

from rewriter import errors
from rewriter.cli import guard, inspecting

CODES = {
    errors.UsageError: 2,
    errors.InputError: 3,
    errors.NoSiteError: 4,
    errors.VerificationError: 5,
    errors.OutputError: 6,
    errors.UnsupportedError: 7,
}


def _raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspecting, "open_source", fail)


@pytest.mark.parametrize("kind", list(CODES))
def test_every_error_of_the_package_has_its_exit_code(
    kind: type[errors.RewriterError], monkeypatch: pytest.MonkeyPatch
) -> None:
    _raises(monkeypatch, kind("this is wrong;\n  do that"))
    assert failed(run("inspect", "x"), CODES[kind]) == "error: this is wrong; do that"


def test_an_error_is_json_too_when_json_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _raises(monkeypatch, errors.InputError("no such thing"))
    out = run("inspect", "x", "--json")
    assert failed(out, 3) == "error: no such thing"
    assert json.loads(out.stdout) == {
        "error": {"kind": "InputError", "message": "no such thing", "exit_code": 3}
    }


def test_an_unexpected_exception_is_called_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.TRACEBACK_VARIABLE, raising=False)
    _raises(monkeypatch, ValueError("shapes\ndiffer"))
    line = failed(run("inspect", "x"), 70)
    assert "bug" in line
    assert "ValueError: shapes differ" in line
    assert "REWRITER_TRACEBACK=1" in line


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_traceback_is_shown_on_demand(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _raises(monkeypatch, ValueError("inner"))
    if way == "variable":
        monkeypatch.setenv(guard.TRACEBACK_VARIABLE, "1")
    out = run("inspect", "x", *(["--traceback"] if way == "option" else []))
    assert out.exit_code == 70
    assert "Traceback (most recent call last)" in out.stderr
    assert out.stderr.splitlines()[-1].startswith("error: this is a bug")


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _raises(monkeypatch, KeyboardInterrupt())
    out = run("inspect", "x")
    assert out.exit_code == 130
    assert out.stderr == "interrupted\n"


def test_out_of_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    _raises(monkeypatch, MemoryError())
    assert "out of memory" in failed(run("inspect", "x"), 1)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in failed(run("inspect", tmp_path / "nothing"), 3)


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rewriter", "mixers"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == guard.BROKEN_PIPE
    assert done.stderr == ""
