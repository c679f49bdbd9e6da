"""The limits, by URL."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog

from headrace.claims import RECOVERED, Ask, Claim, Settle
from headrace.errors import StoreUnavailable
from headrace.ports import Ledger
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import MOST_AT_ONCE, LimitPlace, SharedLimits, Spent, nothing_spent
from headrace.types import UsageRow

SETTLE_TIMEOUT = 5.0
"""Seconds; nobody waits for it."""
SETTLE_WITHIN = 600.0
REMEMBERED = 100.0
"""Seconds for which Redis surely knows that a lease was settled (`limits.lua`)."""
WRITTEN = 0.5
"""Seconds; as in `limits.lua`."""


def open_limits(url: str, memory: LimitPlace, *, ledger: Ledger | None, processes: int, journals: Path | None = None) -> SharedLimits:
    """`memory` is the place of `memory://`; `journals` the folder of all journals of this machine.

    Raises `ConfigError` where Redis' driver isn't installed, or for a URL that can't be one.
    """
    place = memory if url == "memory://" else RedisLimits(url)
    return SharedLimits(place, spent=nothing_spent if ledger is None else spent_by(ledger, journals), processes=processes)


def spent_by(ledger: Ledger, journals: Path | None = None) -> Spent:
    """What the ledger has on a subject. Raises `StoreUnavailable` also while bills wait in a journal for a database that was away."""

    async def spent(claim: Claim, since: float) -> int:
        if journals is not None and await asyncio.to_thread(_bills_wait, journals):
            raise StoreUnavailable("Not all bills are in the ledger yet, so it isn't known what this caller has spent.", retry_after=1)
        kind, _, name = claim.subject.partition(":")
        if kind == "key":
            return await ledger.used("key", name, since)
        if kind == "tenant":
            return await ledger.used("tenant", name, since)
        return 0

    return spent


def _bills_wait(journals: Path) -> bool:
    """Whether a journal of any process, living or dead, holds anything."""
    return any(journals.glob("[!.]*/*.log"))


def settlement(row: UsageRow) -> Settle:
    """What a request of a process that died really used, for the limits, once its bill is in the ledger."""
    used = row.prompt_tokens + row.completion_tokens
    if row.settled_at is not None and time.time() - row.settled_at > REMEMBERED:
        # Whether it was settled before isn't known any more; a lease that is still there says that it wasn't.
        return Settle(row.id, used)
    subjects = [f"key:{row.key}"] if row.key else []
    claims = (*map(Claim, subjects), Claim(f"tenant:{row.tenant}"))
    # A budget that was read since then has it; one that hasn't been read yet will have it.
    ended = 0.0 if row.settled_at is None else row.settled_at - WRITTEN
    return Settle(row.id, used, claims, RECOVERED, ended)


async def settle_in_redis(url: str, settled: list[Ask]) -> None:
    """Tell Redis what requests of processes that died really used.

    While it is away it is tried again, for `SETTLE_WITHIN` seconds; until then budgets stay charged with all that they had leased.
    """
    place = RedisLimits(url, timeout=SETTLE_TIMEOUT)
    gives_up, pause = time.monotonic() + SETTLE_WITHIN, 0.5
    try:
        while settled:
            part = settled[:MOST_AT_ONCE]
            try:
                await place.exchange(part)
                settled = settled[len(part) :]
            except StoreUnavailable as error:
                if time.monotonic() > gives_up:
                    structlog.get_logger("headrace.limits").warning("limits of dead processes stay charged", reason=error.message)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)
    finally:
        await place.close()
