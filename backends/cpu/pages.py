"""Large pages for memory that is read over and over.

A processor reads memory by pages: address translation and prefetching start anew at each. Weights
that lie in pages of 2 MB are read up to half faster than in pages of 4 KB. Linux moves memory that
is in use into large pages when asked (MADV_COLLAPSE, Linux 6.1): addresses and values stay. Where
that is not possible nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor

PAGE = 2**21
_COLLAPSE = 25


def use_large_pages(tensors: Iterable[Tensor]) -> int:
    """Move the memory of CPU tensors into large pages; returns how many pages were moved.

    A page is asked for if these tensors fill at least half of it.
    """
    advise = _madvise()
    if advise is None:
        return 0
    return sum(advise(page, PAGE, _COLLAPSE) == 0 for page in pages_of(tensors))


def pages_of(tensors: Iterable[Tensor]) -> list[int]:
    """Addresses of the large pages of which contiguous CPU tensors fill at least half."""
    filled: dict[int, int] = defaultdict(int)
    seen: set[int] = set()
    for x in tensors:
        if x.device.type != "cpu" or not x.is_contiguous() or x.data_ptr() in seen:
            continue
        seen.add(begin := x.data_ptr())
        end = begin + x.numel() * x.element_size()
        for page in range(begin // PAGE * PAGE, end, PAGE):
            filled[page] += min(end, page + PAGE) - max(begin, page)
    return sorted(page for page, size in filled.items() if size >= PAGE // 2)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
