"""The limits, by URL."""

from __future__ import annotations

from headrace.claims import Claim
from headrace.ports import Ledger
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import LimitPlace, SharedLimits, Spent, nothing_spent


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
