"""Advice to the system on memory that Python doesn't hold, by address: `mmap.madvise` is for Python's own mappings."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

DONTNEED, POPULATE_WRITE, COLLAPSE = 4, 23, 25
"""Linux's numbers."""


def adviser() -> Callable[[int, int, int], int]:
    """`madvise(address, bytes, advice)` of the C library: 0, or the error's number. The interpreter is free meanwhile."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def advise(address: int, size: int, advice: int) -> int:
        return (ctypes.get_errno() or errno.EINVAL) if madvise(address, size, advice) else 0

    return advise
