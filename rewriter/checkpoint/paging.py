"""Weights that stay in their files: mapped, read when they are used, and given back to the system.

A weight file is mapped, not read: a weight takes memory from its first use on. For a model larger
than memory that is not enough, since the pages of every layer that has run stay with the process.
`Pages` gives them back while the model runs; the next use maps them again from the system's cache
or the disk. What was written to (a private copy of a page) is never given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_hook

_MAPS, _SMALL = Path("/proc/self/smaps"), Path("/proc/self/statm")


class Pages:
    """The resident pages of some weight files in this process.

    Attributes:
        files: the files; other files and all other memory are left alone.
        limit: bytes of mapped files that may stay resident between two modules of a model.
    """

    def __init__(self, files: Sequence[Path], limit: int):
        self.files = frozenset(str(file.resolve()) for file in files)
        self.limit = limit

    @contextlib.contextmanager
    def kept_within(self) -> Iterator[None]:
        """Inside the block, pages are given back after a module has run if they exceed the limit.

        The weights of the module that runs are resident as a whole meanwhile. Where the system has
        no /proc/self/smaps (not Linux) nothing is given back.
        """

        if not self.files:
            yield
            return
        self.give_back()
        others = resident_file_bytes()  # libraries: theirs to keep

        def after(*_: Any) -> None:
            nonlocal others
            if resident_file_bytes() - others > self.limit:
                self.give_back()
                others = resident_file_bytes()

        handle = register_module_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()
            self.give_back()

    def give_back(self) -> int:
        """Give all pages back that nobody wrote to; returns the bytes of their mappings."""
        if not self.files:
            return 0
        madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
        if madvise is None:
            return 0
        total = 0
        for start, stop in self._clean():
            advice = ctypes.c_int(getattr(mmap, "MADV_DONTNEED", 4))
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice) == 0:
                total += stop - start
        return total

    def _clean(self) -> Iterator[tuple[int, int]]:
        """Address ranges of mappings of the files that hold resident pages, all of them clean."""
        try:
            text = _MAPS.read_bytes().decode(errors="surrogateescape")
        except OSError:
            return
        start = stop = resident = 0
        for line in text.splitlines():
            field, _, value = line.partition(":")
            if field == "Rss" and stop:
                resident = int(value.split()[0])
            elif field == "Anonymous" and stop:
                if resident and int(value.split()[0]) == 0:
                    yield start, stop
                stop = 0
            elif "-" in field:
                parts = line.split(maxsplit=5)
                stop = 0
                if len(parts) == 6 and parts[5] in self.files:
                    start, stop = (int(x, 16) for x in parts[0].split("-"))


def resident_file_bytes() -> int:
    """Bytes of mapped files that are resident in this process; 0 where the system does not say."""
    try:
        return int(_SMALL.read_bytes().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def available_bytes() -> int:
    """Memory that a program may take without others being swapped out."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
