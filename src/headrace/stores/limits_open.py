"""The limits, by URL."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.claims import RECENT, RECOVERED, Claim, Settle
from headrace.errors import StoreUnavailable
from headrace.ports import Ledger
from headrace.records import UsageRow
from headrace.stores.limits_owed import OwedFile
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import LimitPlace, SharedLimits, Spent, nothing_spent

WRITTEN = 0.5
"""Seconds; as in `limits.lua`."""


def open_limits(
    url: str,
    memory: LimitPlace,
    *,
    ledger: Ledger | None,
    processes: int,
    journals: Path | None = None,
    owed: Path | None = None,
    owner: str = "",
) -> SharedLimits:
    """`memory` is the place of `memory://`; `journals` the folder of all journals of this machine; `owed` a file of this process for what
    Redis is to hear when it is back, whether or not this process lives then; `owner` the name under which this process writes bills.

    Raises `ConfigError` where Redis' driver isn't installed, or for a URL that can't be one.
    """
    spent = nothing_spent if ledger is None else spent_by(ledger, journals)
    if url == "memory://":
        return SharedLimits(memory, spent=spent, processes=processes, owner=owner)
    return SharedLimits(RedisLimits(url), spent=spent, processes=processes, kept=None if owed is None else OwedFile(owed), owner=owner)


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
    subjects = [f"key:{row.key}"] if row.key else []
    claims = (*map(Claim, subjects), Claim(f"tenant:{row.tenant}"))
    # A budget that was read since then has it; one that hasn't been read yet will have it.
    ended = 0.0 if row.settled_at is None else row.settled_at - WRITTEN
    return Settle(row.id, row.prompt_tokens + row.completion_tokens, claims, RECOVERED if row.status == "interrupted" else RECENT, ended)
