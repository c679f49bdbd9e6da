"""A process's heap in huge pages, where the system has them: Linux' transparent ones, which most systems give only who asks.

What a request needs is scattered over a heap of 100 MiB. An engine that reads all its weights for each step leaves nothing of it in the
processors' caches, nor of where the pages are: with pages of 4 KiB each needs a look-up of its own, and in a virtual machine each of those
two dozen. In huge pages requests take an API process 13 % less processor time (2 cores, beside an engine that is never idle).
"""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.engine.madvise import COLLAPSE, adviser

SIZE = 2 << 20
"""Bytes of a huge page."""
RESIDENT = 0.75
"""Of a mapping, how much is to be in memory already: the rest is taken, too."""
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather() -> int:
    """Put into huge pages what is on the heap now: bytes of it. 0 where the system has none (Linux 6.1), or its administrator wants none.

    It takes some 0.3 s of processor time for 100 MiB, in which other threads run, but for a moment for each page.
    """
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in _ENABLED.read_text():
            return 0
        mappings = _heap(Path("/proc/self/smaps").read_text(errors="surrogateescape"))
    except OSError:
        return 0
    advise = adviser()
    gathered = 0
    for start, end in mappings:
        # One at a time: where one can't be had the others may be.
        for page in range(start, end, SIZE):
            if advise(page, SIZE, COLLAPSE) == 0:
                gathered += SIZE
    return gathered


def _heap(smaps: str) -> list[tuple[int, int]]:
    """Address ranges, whole huge pages, of private memory that belongs to no file and is mostly in use."""
    found: list[tuple[int, int]] = []
    place: tuple[int, int] | None = None
    for line in smaps.splitlines():
        parts = line.split(maxsplit=5)
        if not parts[0].endswith(":"):
            # address range, permissions, offset, device, inode, path
            ours = parts[1] == "rw-p" and parts[4] == "0" and (len(parts) == 5 or parts[5] == "[heap]")
            start, end = (int(number, 16) for number in parts[0].split("-"))
            place = (start, end) if ours else None
        elif place is not None and parts[0] == "Rss:" and int(parts[1]) * 1024 >= RESIDENT * (place[1] - place[0]):
            start, end = -(-place[0] // SIZE) * SIZE, place[1] // SIZE * SIZE
            if start < end:
                found.append((start, end))
    return found
