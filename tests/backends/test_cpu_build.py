"""The compile cache: concurrent and killed compiles, bad directories, damaged files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from rewriter.backends.cpu import build
from rewriter.backends.cpu.build import Compiler, NoKernel, Unit, built, find_compiler, intact, load
from rewriter.backends.cpu.target import TARGETS, VARIABLE, Target, host_target

SOURCE = 'extern "C" __attribute__((visibility("default"))) int f(int x) { return x + 1; }\n'
UNIT = Unit("plus_one", SOURCE, TARGETS["portable"])

PROGRAM = f"""
from rewriter.backends.cpu.build import Unit, load
from rewriter.backends.cpu.target import TARGETS
print(load(Unit("plus_one", {SOURCE!r}, TARGETS["portable"])).f(41))
"""


@pytest.fixture
def compiler() -> Compiler:
    found = find_compiler()
    if isinstance(found, NoKernel):
        pytest.skip(found.reason)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> Path:
    monkeypatch.setenv(build.VARIABLE, str(tmp_path))
    return tmp_path / "cpu"


def slow_compiler(directory: Path, seconds: float) -> Path:
    """A compiler that writes half of its output, waits, then does its work."""
    script = directory / "slow-g++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo slow 1; exit;; esac\n'
        f'for last; do :; done\nprintf half > "$last"\nsleep {seconds}\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    return script


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, build.VARIABLE: str(cache.parent), **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def files(cache: Path, pattern: str) -> list[str]:
    return sorted(p.name for p in cache.glob(pattern))


def test_compiles_once_and_keeps_the_source(cache: Path) -> None:
    library = load(UNIT)
    assert not isinstance(library, NoKernel) and library.f(41) == 42
    (name,) = files(cache, "*.so")
    assert (cache / name).with_suffix(".cpp").read_text() == SOURCE
    assert files(cache, "*.tmp*") == []
    changed = (cache / name).stat().st_mtime_ns
    assert load(UNIT) is library
    assert (cache / name).stat().st_mtime_ns == changed


def test_everything_that_matters_is_in_the_key(compiler: Compiler) -> None:
    others = [
        Unit("plus_one", SOURCE + "//", TARGETS["portable"]),
        Unit("plus_one", SOURCE, TARGETS["avx2"]),
    ]
    keys = {build.key(unit, compiler) for unit in (UNIT, *others)}
    keys.add(build.key(UNIT, Compiler(compiler.command, "another version")))
    assert len(keys) == 4


def test_two_processes_compile_at_once(cache: Path, tmp_path: Path) -> None:
    slow = str(slow_compiler(tmp_path, 1.0))
    both = [start(cache, CXX=slow) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["42", "42"]
    assert len(files(cache, "*.so")) == 1
    assert files(cache, "*.tmp*") == []


def test_a_killed_compile_leaves_nothing_that_is_used(cache: Path, tmp_path: Path) -> None:
    process = start(cache, CXX=str(slow_compiler(tmp_path, 60.0)))
    deadline = time.monotonic() + 120
    while not files(cache, "*.tmp.so") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    left = files(cache, "*.tmp.*")
    assert left and files(cache, "*.so") == [n for n in left if n.endswith(".so")]
    library = load(UNIT)
    assert not isinstance(library, NoKernel) and library.f(1) == 2
    # What was left behind is removed once it is old.
    for name in left:
        os.utime(cache / name, (0, 0))
    other = Unit("other", SOURCE + "// again\n", TARGETS["portable"])
    assert not isinstance(load(other), NoKernel)
    assert not set(left) & set(files(cache, "*"))


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_file_is_compiled_anew(cache: Path, compiler: Compiler, damage: str) -> None:
    cache.mkdir(parents=True)
    path = built(UNIT, compiler, cache)
    assert isinstance(path, Path) and intact(path)
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 255
    path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}.get(damage, len(data))])
    assert not intact(path)
    assert built(UNIT, compiler, cache) == path and intact(path)


def refuse(code: int):
    def write(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return write


def test_a_directory_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.joinpath("cpu").write_text("a file is in the way")
    with pytest.warns(RuntimeWarning, match="cannot be kept") as seen:
        library = load(UNIT)
    assert not isinstance(library, NoKernel) and library.f(1) == 2
    assert len(seen) == 1 and build.VARIABLE in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        other = Unit("other", SOURCE + "// read-only\n", TARGETS["portable"])
        assert not isinstance(load(other), NoKernel)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_directory(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert not isinstance(load(UNIT), NoKernel)
    cache.chmod(0o700)


def test_a_full_disk(cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the result is written."""
    cache.mkdir(parents=True)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.parent == cache:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.warns(RuntimeWarning, match="No space left"):
        path = built(UNIT, compiler, cache)
    assert isinstance(path, Path) and path.parent != cache and intact(path)
    assert files(cache, "*") == []


def test_a_full_disk_everywhere(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setattr(Path, "write_text", refuse(errno.ENOSPC))
    with pytest.warns(RuntimeWarning, match="No space left"):
        found = built(UNIT, compiler, cache)
    assert isinstance(found, NoKernel) and "No space left" in found.reason


def test_the_compiler_reports_a_full_disk(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    script = tmp_path / "full-g++"
    script.write_text('#!/bin/sh\necho "fatal error: No space left on device" >&2\nexit 1\n')
    script.chmod(0o755)
    with pytest.warns(RuntimeWarning, match="No space left"):
        found = built(UNIT, Compiler((str(script),), "full"), cache)
    assert isinstance(found, NoKernel) and "No space left" in found.reason


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(build.VARIABLE, str(tmp_path))
    with pytest.warns(RuntimeWarning, match="was not found"):
        found = find_compiler()
    assert isinstance(found, NoKernel) and "install one" in found.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert find_compiler() == found


def test_the_named_compiler_is_missing() -> None:
    with pytest.warns(RuntimeWarning, match="no-such-compiler"):
        found = find_compiler("no-such-compiler -x")
    assert isinstance(found, NoKernel) and "no-such-compiler" in found.reason


def test_a_source_with_an_error(cache: Path) -> None:
    found = load(Unit("broken", "int f( {\n", TARGETS["portable"]))
    assert isinstance(found, NoKernel)
    assert "broken could not be compiled" in found.reason and "error" in found.reason


def test_the_target_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "portable")
    assert host_target() == TARGETS["portable"]
    monkeypatch.setenv(VARIABLE, "mmx")
    assert "mmx" in str(host_target())


def test_a_compiler_without_an_instruction_set_gets_a_lower_target(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that knows no tiles and no AVX-512: the processor's are not used then."""
    script = tmp_path / "old-g++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx512*|*-mamx*) echo "error: unknown" >&2; exit 1; esac\n'
        'exec g++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.delenv(VARIABLE, raising=False)
    best = host_target()
    monkeypatch.setenv("CXX", str(script))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = host_target()
    assert isinstance(best, Target) and isinstance(found, Target)
    if any("avx512" in flag for flag in best.flags):
        assert "old-g++ does not know" in str(said[0].message)
    assert not any("avx512" in flag or "amx" in flag for flag in found.flags)
    library = load(Unit("plus_one", SOURCE, found))
    assert not isinstance(library, NoKernel) and library.f(1) == 2
