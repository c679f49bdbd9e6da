"""The cache in a process's own memory: the least recently used values give way, by bytes.

Those of tenants that have more than their share give way first, so that nobody can push out what others have kept. A tenant's share is an
equal part for each that has something here; what others leave free is anybody's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from headrace.records import CacheSize, CacheTags

OVERHEAD = 512
"""Bytes that an entry takes besides its value, measured as the growth of a process holding many small ones."""
LOOKS = 64
"""Entries that are looked at for one of a tenant with more than its share; if there is none among them, the oldest goes."""
LARGEST_SHARE = 4
"""A value over this part of the whole is not kept: it would push out too much else."""


@dataclass(slots=True)
class _Entry:
    value: bytes
    tags: CacheTags
    expires: float


class MemoryCache:
    """`ports.Cache`. `clock` is in seconds and never goes back. What has expired is kept for `grace` seconds, for `recall_old`."""

    def __init__(self, max_bytes: int, *, grace: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._grace = grace
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._by_tenant: dict[str, OrderedDict[bytes, None]] = {}
        """The names of each tenant's entries, likewise in the order of their last use."""
        self._bytes_of: dict[str, int] = {}
        self._bytes = 0

    async def get(self, key: bytes) -> bytes | None:
        return self.recall(key)

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        self.keep(key, value, tags, ttl)

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        found = [name for name, entry in self._entries.items() if matches(entry.tags, tenant, model, key)]
        for name in found:
            self._drop(name)
        return len(found)

    async def close(self) -> None:
        self.clear()

    async def size(self) -> CacheSize:
        self._expire()
        return CacheSize(len(self._entries), self._bytes)

    def recall(self, key: bytes) -> bytes | None:
        """As `get`, at once."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._clock()
        if entry.expires <= now:
            if entry.expires + self._grace <= now:
                self._drop(key)
            return None
        self._entries.move_to_end(key)
        self._by_tenant[entry.tags.tenant].move_to_end(key)
        return entry.value

    def recall_old(self, key: bytes) -> bytes | None:
        """As `recall`, also for what has expired a while ago."""
        entry = self._entries.get(key)
        if entry is None or entry.expires + self._grace <= self._clock():
            return None
        return entry.value

    def keep(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        """As `put`, at once."""
        if key in self._entries:
            self._drop(key)
        size = len(value) + OVERHEAD
        if size > self._max_bytes // LARGEST_SHARE:
            return
        self._entries[key] = _Entry(value, tags, self._clock() + ttl)
        self._by_tenant.setdefault(tags.tenant, OrderedDict())[key] = None
        self._bytes_of[tags.tenant] = self._bytes_of.get(tags.tenant, 0) + size
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(self._least_due(tags.tenant))

    def clear(self) -> None:
        self._entries.clear()
        self._by_tenant.clear()
        self._bytes_of.clear()
        self._bytes = 0

    def _least_due(self, writer: str) -> bytes:
        """What gives way to something that this tenant keeps: its own, if it has more than its share, or of another that has."""
        share = self._max_bytes / len(self._by_tenant)
        if self._bytes_of[writer] > share and len(self._by_tenant[writer]) > 1:
            return next(iter(self._by_tenant[writer]))
        for key in islice(self._entries, LOOKS):
            if self._bytes_of[self._entries[key].tags.tenant] > share:
                return key
        return next(iter(self._entries))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        tenant, size = entry.tags.tenant, len(entry.value) + OVERHEAD
        self._bytes -= size
        self._bytes_of[tenant] -= size
        del self._by_tenant[tenant][key]
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant], self._bytes_of[tenant]

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, entry in self._entries.items() if entry.expires + self._grace <= now]:
            self._drop(key)


def matches(tags: CacheTags, tenant: str | None, model: str | None, key: str | None) -> bool:
    """Whether a purge by these words means an entry; None is any."""
    return (tenant is None or tags.tenant == tenant) and (model is None or tags.model == model) and (key is None or tags.key == key)
