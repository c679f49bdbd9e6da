"""Slows down who tries many keys that don't exist, and nobody else: every address has its own account, and good keys don't touch it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address

from headrace.errors import RateLimited

BURST = 20
"""Bad keys that an address may send without being slowed down."""
EACH = 1.0
"""Seconds that one more bad key costs after that."""
LONGEST_WAIT = 5.0
MOST_WAITING = 16
"""Bad keys of one address that wait at a time; more are refused at once."""
LOOKUPS = 4
"""Look-ups in the store for one address at a time."""
MOST_QUEUED = 256
MOST_ADDRESSES = 10_000


@dataclass(slots=True)
class _Account:
    paid_until: float = float("-inf")
    """In the future: what the address still owes. (The generic cell rate algorithm's theoretical arrival time.)"""
    waiting: int = 0
    queued: int = 0
    lookups: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LOOKUPS))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.queued)


class BadKeys:
    """Accounts by address; networks of 64 bits for IPv6, where one host has so many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @asynccontextmanager
    async def lookup(self, address: str) -> AsyncIterator[None]:
        """A place at the store for a key that isn't known yet. Raises `RateLimited` where one address wants too many at a time."""
        account = self._account(address)
        if account.queued >= MOST_QUEUED:
            raise RateLimited("Too many keys that aren't known here, all from one address.", retry_after=LONGEST_WAIT)
        account.queued += 1
        try:
            async with account.lookups:
                yield
        finally:
            account.queued -= 1

    async def note(self, address: str) -> None:
        """A bad key came from there: wait as long as it costs. Raises `RateLimited` where too many wait already."""
        account = self._account(address)
        now = self._clock()
        account.paid_until = min(max(account.paid_until, now) + EACH, now + BURST * EACH + 60)
        owed = account.paid_until - now - BURST * EACH
        if owed <= 0:
            return
        if account.waiting >= MOST_WAITING:
            raise RateLimited("Too many keys that don't exist came from this address.", retry_after=max(1.0, owed))
        account.waiting += 1
        try:
            await asyncio.sleep(min(owed, LONGEST_WAIT))
        finally:
            account.waiting -= 1

    def _account(self, address: str) -> _Account:
        name = _network(address)
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= MOST_ADDRESSES:
                self._forget()
            account = self._accounts[name] = _Account()
        return account

    def _forget(self) -> None:
        """Those that owe nothing; if all do, the oldest tenth."""
        now = self._clock()
        idle = [name for name, account in self._accounts.items() if account.paid_until <= now and not account.busy]
        for name in idle or [name for name, account in self._accounts.items() if not account.busy][: MOST_ADDRESSES // 10]:
            del self._accounts[name]


def _network(address: str) -> str:
    if ":" not in address:
        return address
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> 64 << 64))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
