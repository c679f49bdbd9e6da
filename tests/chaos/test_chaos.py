"""Streams, bills and limits of servers to which everything happens that can happen to processes and stores.

`CHAOS_SEED` chooses another schedule, `CHAOS_MINUTES` another length; `make chaos` is the long run.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from chaos.ordeal import Ordeal
from chaos.schedule import schedule

pytestmark = pytest.mark.slow

SECONDS = 20.0
"""Enough for everything to be done once."""


def test_whatever_happens_streams_are_whole_and_bills_exact(tmp_path: Path) -> None:
    minutes = float(os.environ.get("CHAOS_MINUTES", "0"))
    seed = int(os.environ.get("CHAOS_SEED") or (random.randrange(10**6) if minutes else 3))
    seconds = 60 * minutes or SECONDS
    limits = "memory" if seed % 3 == 0 else "redis"
    ordeal = Ordeal(tmp_path, schedule(seed, seconds, pause=(0.3, 1.3)), seed=seed, limits=limits)
    try:
        ordeal.run()
    finally:
        sys.stdout.write(ordeal.report + "\n")
    assert not ordeal.findings, ordeal.report
