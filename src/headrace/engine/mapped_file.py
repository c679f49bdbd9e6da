"""Lets go of a file's pages that a library mapped and has copied: weights, which are in memory twice otherwise.

They are the system's to take back anyway, but count as the process's own, and a budget for several models counts what processes have.
What is read again comes back from the system's cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.engine.madvise import DONTNEED, adviser


def let_go(path: Path) -> int:
    """Bytes of address space over that file whose pages were dropped: all mappings that nobody can write to. 0 on other systems than
    Linux."""
    if sys.platform != "linux":
        return 0
    advise = adviser()
    name = str(path.resolve())
    dropped = 0
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return 0
    for line in maps:
        # address range, permissions, offset, device, inode, path
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5] == name and "w" not in parts[1]:
            start, end = (int(number, 16) for number in parts[0].split("-"))
            if advise(start, end - start, DONTNEED) == 0:
                dropped += end - start
    return dropped
