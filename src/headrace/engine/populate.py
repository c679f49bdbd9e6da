"""KV blocks get their memory from the system before a step writes to them.

The first write to a page of memory waits for the system to find and clear it, in a virtual machine for the host as well: up
to 5 ms for each 2 MiB, which made the prefill of a young server take 13 % longer (135M parameters, 2 cores). A thread
of the lowest priority asks for the pages ahead of time instead (`MADV_POPULATE_WRITE`, Linux 5.14), in the pauses that steps leave.
It changes no byte, so that blocks may be in use meanwhile. Where the system can't, the pages come with the first write, as ever.

It is no help to the very first step, which changes the address space many times and waits for a piece each time: 1 s instead of 0.15 s.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Sequence

from headrace.engine.madvise import POPULATE_WRITE, adviser

AHEAD = 512 << 20
"""Bytes kept ready beyond the highest block that was used: the rest of a large budget takes no memory before it is needed."""
_PIECE = 2 << 20
"""Bytes asked for at once. Other threads' changes to the address space wait for it."""


class Populate:
    """Keeps `ahead` bytes beyond the highest block used populated.

    `regions` are the (address, bytes of a block) of `num_blocks` blocks each.
    """

    def __init__(self, regions: Sequence[tuple[int, int]], num_blocks: int, *, ahead: int = AHEAD) -> None:
        self._regions = regions
        self._num_blocks = num_blocks
        self._ahead = max(1, ahead // sum(size for _, size in regions))
        self._wanted = 0
        self._done = 0
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="populate", daemon=True)

    @property
    def done(self) -> int:
        """Blocks, from the first on, that have their memory."""
        return self._done

    def start(self) -> None:
        """Begin with the first blocks. Nothing happens on other systems than Linux."""
        if sys.platform == "linux":
            self._thread.start()
            self.reach(0)

    def reach(self, block: int) -> None:
        """`block` is written to; called from the thread of the steps, at no cost."""
        wanted = min(block + 1 + self._ahead, self._num_blocks)
        # Not for every block: each time a sixteenth of what is to be ready.
        if wanted - self._wanted > self._ahead // 16 or self._wanted < wanted == self._num_blocks:
            self._wanted = wanted
            self._wake.set()

    def close(self) -> None:
        """End the thread, before the memory goes."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        advise = adviser()
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            wanted = self._wanted
            for address, size in self._regions:
                start, end = address + self._done * size, address + wanted * size
                start -= start % page
                for begin in range(start, end, _PIECE):
                    if self._ended:
                        return
                    if advise(begin, min(_PIECE, end - begin), POPULATE_WRITE) not in (0, errno.EAGAIN):
                        return  # an older kernel, or no memory left: then the first write finds out
            self._done = wanted
