"""The limits, by URL."""

from __future__ import annotations

import structlog

from headrace.claims import Ask, Claim
from headrace.errors import StoreUnavailable
from headrace.ports import Ledger
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import LimitPlace, SharedLimits, Spent, nothing_spent

SETTLE_TIMEOUT = 5.0
"""Seconds; nobody waits for it."""


def open_limits(url: str, memory: LimitPlace, *, ledger: Ledger | None, processes: int) -> SharedLimits:
    """`memory` is the place of `memory://`. Raises `ConfigError` where Redis' driver isn't installed, or for a URL that can't be one."""
    place = memory if url == "memory://" else RedisLimits(url)
    return SharedLimits(place, spent=nothing_spent if ledger is None else spent_by(ledger), processes=processes)


def spent_by(ledger: Ledger) -> Spent:
    """What the ledger has on a subject."""

    async def spent(claim: Claim, since: float) -> int:
        kind, _, name = claim.subject.partition(":")
        if kind == "key":
            return await ledger.used("key", name, since)
        if kind == "tenant":
            return await ledger.used("tenant", name, since)
        return 0

    return spent


async def settle_in_redis(url: str, settled: list[Ask]) -> None:
    """Tell Redis what requests of processes that died really used.

    If it is away, their budgets stay charged with all that they had leased.
    """
    place = RedisLimits(url, timeout=SETTLE_TIMEOUT)
    try:
        await place.exchange(settled)
    except StoreUnavailable as error:
        structlog.get_logger("headrace.limits").warning("limits of dead processes stay charged", reason=error.message)
    finally:
        await place.close()
