"""From the journal's files into the ledger: every row has its effect once, however often it is tried."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from headrace.ports import Ledger
from headrace.records import UsageRow
from headrace.stores.journal import read

GROUP = 500
"""Rows in one transaction."""
TIMEOUT = 20.0
"""Seconds for one of them."""


async def replay(ledger: Ledger, paths: Sequence[Path]) -> None:
    """Write what the files hold, and remove each once its rows are durable elsewhere. Raises `StoreUnavailable` and `TimeoutError`."""
    for path in paths:
        rows = await asyncio.to_thread(_rows, path)
        for at in range(0, len(rows), GROUP):
            async with asyncio.timeout(TIMEOUT):
                await ledger.write(*parted(rows[at : at + GROUP]))
        path.unlink()


def _rows(path: Path) -> list[UsageRow]:
    return list(read(path))


def parted(rows: Sequence[UsageRow]) -> tuple[list[UsageRow], list[UsageRow]]:
    """Those that are opened, and those that are settled."""
    return [row for row in rows if row.settled_at is None], [row for row in rows if row.settled_at is not None]
