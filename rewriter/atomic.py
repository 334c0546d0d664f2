"""Atomic output: a kill at any moment leaves the old result or the new one, never a half."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rewriter.errors import OutputError

if sys.platform != "win32":  # without locks, partial directories are judged by pid and age
    import fcntl

STALE_SECONDS = 60.0
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another target",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another target",
    errno.EFBIG: "a file would exceed the size limit of this process or file system",
    errno.EROFS: "the file system is read-only; choose another target",
    errno.EACCES: "permission denied; choose a target you may write to",
    errno.EPERM: "permission denied; choose a target you may write to",
    errno.ENOTDIR: "a part of the path is a file; choose another target",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def output_error(target: Path, error: OSError) -> OutputError:
    """The sentence for a failed write."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"cannot write {target}: {reason}")


def write_file(path: Path, content: bytes) -> None:
    """Write one small file through a temporary sibling.

    Raises:
        OutputError: it cannot be written; an existing file is then unchanged.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        try:
            partial.write_bytes(content)
            fsync(partial)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        fsync(path.parent)
    except OSError as error:
        raise output_error(path, error) from error


@contextlib.contextmanager
def directory(target: Path, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a hidden sibling directory that becomes `target` when the block ends well.

    An existing target is exchanged in one step where the system can (Linux renameat2); elsewhere
    by two renames, and the next write to the same target repairs a kill between them.

    Args:
        target: the directory to make; missing parents are made too.
        overwrite: replace an existing checkpoint (never a directory of other things).
        needed_bytes: refused early if less space is free.

    Raises:
        OutputError: the target exists, is not writable, or the disk is full; nothing is left.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a symlinked target
    parents = _missing_parents(target)
    lock: int | None = None
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        try:
            if target.parent.is_dir():
                _repair(target)
                _remove_stale(target)
            _check_target(target, overwrite)
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target, needed_bytes)
            partial.mkdir()
            lock = _lock(partial)
            yield partial
            for path in sorted(partial.rglob("*")):
                fsync(path)
            fsync(partial)
            _publish(partial, target)
            fsync(target.parent)
        except OSError as error:
            raise output_error(target, error) from error
    except BaseException:
        _remove(partial)
        for parent in parents:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if still empty
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _remove(partial)  # after an exchange it holds the old content


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk; systems that cannot do so for directories are fine."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        handle = os.open(path, flags)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"cannot write {target}: there is a file of that name; choose another")
    entries = {path.name for path in target.iterdir()}
    if not entries:
        return  # an empty directory is as good as none
    if not overwrite:
        raise OutputError(f"{target} already exists; choose another target or ask to overwrite it")
    if "config.json" not in entries and "rewriter.json" not in entries:
        raise OutputError(
            f"{target} exists and holds no checkpoint, so it is not overwritten; choose another "
            "target or empty it yourself"
        )


def _check_space(target: Path, needed: int) -> None:
    if shutil.disk_usage(target.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _publish(partial: Path, target: Path) -> None:
    if target.is_symlink():
        target = target.resolve()
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)  # rename replaces an empty directory
    elif not _exchange(partial, target):
        old = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(3)}")
        target.rename(old)
        partial.rename(target)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    result = renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code))


def _repair(target: Path) -> None:
    """Bring the old content back after a kill between the two renames of the fallback."""
    if target.exists():
        return
    for old in sorted(target.parent.glob(f".{_escaped(target.name)}.old-*")):
        if _is_stale(old, age=0.0):
            old.rename(target)
            return


def _remove_stale(target: Path) -> None:
    for kind in ("partial", "old"):
        for path in target.parent.glob(f".{_escaped(target.name)}.{kind}-*"):
            if _is_stale(path, age=STALE_SECONDS):
                _remove(path)


def _is_stale(path: Path, age: float) -> bool:
    """Its writer is gone: nobody holds its lock, and the pid is dead or the directory is old.

    A pid alone is not enough, since containers reuse small pids.
    """
    try:
        handle = _lock(path)
        if handle is None and sys.platform != "win32":
            return False
        if handle is not None:
            os.close(handle)
        pid = int(path.name.rpartition(".")[2].split("-")[1])
        old = time.time() - path.stat().st_mtime > age
    except (OSError, ValueError, IndexError):
        return False
    return old or not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _lock(path: Path) -> int | None:
    """Hold an advisory lock on a directory until the handle is closed or the process dies."""
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _missing_parents(target: Path) -> list[Path]:
    """Parents that do not exist yet, the innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
