"""How fast this machine reads its memory: what bounds how fast one conversation is answered."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

SIZE = 96 * 2**20
"""Bytes that each thread reads; more than the caches of most processors hold."""
ROUNDS = 3


def measure_bandwidth(threads: int) -> float:
    """Bytes a second, by all threads together: the best of a few rounds. Takes about 0.2 s and 96 MiB a thread."""
    import numpy as np

    arrays = [np.ones(SIZE // 8, np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, threads * SIZE / (time.perf_counter() - began))
    return best
