"""The levels of the response cache: this process's memory, then what all processes share.

Purges reach the other processes through the second level: whoever purges leaves a mark there, a random word, and every process that finds
a word it doesn't know forgets all that it has in memory. (What wasn't purged comes back from the second level.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from headrace.errors import StoreUnavailable
from headrace.logs import REQUEST_ID
from headrace.ports import Cache, Sized
from headrace.records import CacheSize, CacheTags
from headrace.stores.cache_memory import MemoryCache
from headrace.stores.cache_together import put_many

READ_TIMEOUT = 0.25
"""Seconds that a request waits for the second level."""
WRITE_TIMEOUT = 5.0
GATHER = 0.1
"""Seconds that a value waits for others to be written with."""
MOST_AT_ONCE = 256
MOST_WAITING = 1024
MOST_BYTES_WAITING = 32 * 1048576
"""Values that wait to be written, and their bytes; what comes on top is kept in memory only."""
PAUSE = 2.0
"""Seconds in which a second level that failed is left alone."""
LOOK = 0.5
"""Seconds between two looks for the mark of a purge."""

_MARK = b"headrace purge"
_OURS = CacheTags("", "")
_EXPIRY = struct.Struct(">d")


@dataclass(slots=True)
class LevelCounts:
    """What became of look-ups and writes in this process."""

    memory_hits: int = 0
    second_hits: int = 0
    misses: int = 0
    writes: int = 0
    writes_dropped: int = 0
    errors: int = 0
    """Look-ups and writes that the second level failed, or was too slow for."""


class CacheLevels:
    """`ports.Answers`, `ports.Publishes` and `ports.KeepsOld`. `second` is called `name` in headers and figures; values live `ttl` seconds,
    and are kept for `grace` seconds more (the memory's is its own matter). `clock` is Unix time."""

    def __init__(
        self,
        memory: MemoryCache,
        second: Cache | None = None,
        *,
        name: str = "",
        ttl: float,
        grace: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._second = second
        self._name = name
        self._ttl = ttl
        self._grace = grace
        self._clock = clock
        self.counts = LevelCounts()
        self.purges = 0
        self.told: Callable[[Sequence[bytes], bool], None] | None = None
        self._mark: bytes | None = None
        self._leaving: bytes | None = None
        """The mark of this process' own last purge, from before it can be read."""
        self._looked = False
        """For marks; those found at first are of purges before this process' time."""
        self._rest_until = 0.0
        self._waiting: list[tuple[bytes, bytes, CacheTags]] = []
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._gathering: asyncio.Future[None] | None = None
        """Done when what waits is to be written."""
        self._hurried = False
        self._under_way: asyncio.Future[None] | None = None
        """Done when the write that has begun is over."""
        self._watching: asyncio.Task[None] | None = None

    async def open(self, timeout: float) -> None:
        """Have the second level at hand before requests wait for it, if that takes `timeout` seconds at most: they would wait for less."""
        if self._second is not None:
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._second.get(_MARK)

    def recall(self, key: bytes) -> bytes | None:
        found = self._memory.recall(key)
        if found is not None:
            self.counts.memory_hits += 1
        return found

    async def fetch(self, key: bytes) -> tuple[bytes, str] | None:
        if self._second is None or time.monotonic() < self._rest_until:
            self.counts.misses += 1
            return None
        self._watch()
        purges = self.purges
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                found = await self._second.get(key)
        except (StoreUnavailable, TimeoutError) as error:
            self._failed("read", error)
            found = None
        if found is None or len(found) < 2 + _EXPIRY.size or (left := _EXPIRY.unpack_from(found)[0] - self._clock()) <= 0:
            self.counts.misses += 1
            return None
        value, tags = _unpacked(found)
        if purges == self.purges:
            # Not if it was read before a purge and arrives after.
            self._memory.keep(key, value, tags, min(left, self._ttl))
        self.counts.second_hits += 1
        return value, self._name

    async def old(self, key: bytes) -> tuple[bytes, str] | None:
        remembered = self._memory.recall_old(key)
        if remembered is not None:
            return remembered, "memory"
        if self._second is None or time.monotonic() < self._rest_until:
            return None
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                found = await self._second.get(key)
        except (StoreUnavailable, TimeoutError) as error:
            self._failed("read", error)
            return None
        return None if found is None or len(found) < 2 + _EXPIRY.size else (_unpacked(found)[0], self._name)

    def keep(self, key: bytes, value: bytes, tags: CacheTags) -> None:
        self._memory.keep(key, value, tags, self._ttl)
        if self._second is None:
            self._tell([key], False)
            return
        self._watch()
        packed = _packed(self._clock() + self._ttl, tags, value)
        full = len(self._waiting) >= MOST_WAITING or self._waiting_bytes + len(packed) > MOST_BYTES_WAITING
        if full or time.monotonic() < self._rest_until:
            self.counts.writes_dropped += 1
            self._tell([key], False)
            return
        self._waiting.append((key, packed, tags))
        self._waiting_bytes += len(packed)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(self._second), name="cache writes")

    @property
    def shared(self) -> bool:
        return self._second is not None and time.monotonic() >= self._rest_until

    def hurry(self) -> None:
        self._hurried, gathering = True, self._gathering
        if gathering is not None and not gathering.done():
            gathering.set_result(None)

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        """Drop entries on all levels, here at once and in other processes' memory within a second; the number of them.

        Raises `StoreUnavailable` if the second level can't be reached: then nothing is purged but this process's memory.
        """
        unwritten = self._purged()
        dropped = await self._memory.purge(tenant=tenant, model=model, key=key)
        self._tell(unwritten, False)
        if self._second is None:
            return dropped
        if self._under_way is not None:
            await asyncio.shield(self._under_way)
        # The last purge's mark is no answer, so it isn't counted as one. It stays until the new one is there: others may not have seen it.
        marked = tenant is model is key is None and await self._second.get(_MARK) is not None
        gone = await self._second.purge(tenant=tenant, model=model, key=key)
        mark = self._leaving = os.urandom(16)
        await self._second.put(_MARK, mark, _OURS, self._ttl + self._grace + 60)
        self._mark = mark
        return max(dropped, gone - marked)

    async def sizes(self) -> dict[str, CacheSize | None]:
        """How full each level is; None for one that can't say."""
        sizes: dict[str, CacheSize | None] = {"memory": await self._memory.size()}
        if self._second is not None:
            sizes[self._name] = None
            if isinstance(self._second, Sized):
                with contextlib.suppress(StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(WRITE_TIMEOUT):
                        size, mark = await self._second.size(), await self._second.get(_MARK)
                        sizes[self._name] = CacheSize(size.entries - (mark is not None), size.bytes)
        return sizes

    async def close(self) -> None:
        """Finish what is being written. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        if self._writing is not None:
            await asyncio.wait((self._writing,), timeout=WRITE_TIMEOUT)
        if self._second is not None:
            await self._second.close()

    async def _write(self, second: Cache) -> None:
        """Write what waits, many values in one go, until nothing came for a while."""
        REQUEST_ID.set("")  # it works for all, whoever was the first
        try:
            while True:
                await self._gather()
                if not self._waiting:
                    return
                while self._waiting:
                    values, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
                    await self._write_some(second, values)
        finally:
            self._writing = None

    async def _gather(self) -> None:
        if not self._hurried:
            loop = asyncio.get_running_loop()
            self._gathering = loop.create_future()
            over = loop.call_later(GATHER, self.hurry)
            try:
                await self._gathering
            finally:
                over.cancel()
                self._gathering = None
        self._hurried = False

    async def _write_some(self, second: Cache, values: list[tuple[bytes, bytes, CacheTags]]) -> None:
        self._waiting_bytes -= sum(len(value) for _, value, _ in values)
        under_way = self._under_way = asyncio.get_running_loop().create_future()
        readable = False
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                # They have waited: what another process has purged meanwhile must not come back.
                if self._heard(await second.get(_MARK)):
                    return
                await put_many(second, values, self._ttl + self._grace)
                self.counts.writes += len(values)
                readable = True
        except (StoreUnavailable, TimeoutError) as error:
            self._failed("write", error)
        finally:
            self._under_way = None
            under_way.set_result(None)
            self._tell([key for key, _, _ in values], readable)

    def _tell(self, keys: Sequence[bytes], readable: bool) -> None:
        if self.told is not None and keys:
            self.told(keys, readable)

    def _purged(self) -> list[bytes]:
        """What was kept until now is not to be written any more. Its names, to be told once memory has forgotten it, too."""
        self.purges += 1
        dropped, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return [key for key, _, _ in dropped]

    def _failed(self, what: str, error: Exception) -> None:
        self.counts.errors += 1
        if time.monotonic() >= self._rest_until:
            reason = error.message if isinstance(error, StoreUnavailable) else "too slow"
            structlog.get_logger("headrace.cache").warning("cache level failed", level=self._name, doing=what, reason=reason)
        self._rest_until = time.monotonic() + PAUSE

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._look_for_marks(), name="cache purges")

    async def _look_for_marks(self) -> None:
        assert self._second is not None
        REQUEST_ID.set("")  # it works for all, whoever was the first
        while True:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT):
                    mark = await self._second.get(_MARK)
            except (StoreUnavailable, TimeoutError):
                mark = None
            self._heard(mark)
            await asyncio.sleep(LOOK)

    def _heard(self, mark: bytes | None) -> bool:
        """Whether others have purged since the last look."""
        first, self._looked = not self._looked, True
        if mark is None or mark in (self._mark, self._leaving):
            return False
        self._mark = mark
        unwritten = [] if first else self._purged()
        self._memory.clear()
        self._tell(unwritten, False)
        return not first


def _packed(expires_at: float, tags: CacheTags, value: bytes) -> bytes:
    words = "\0".join((tags.tenant, tags.model, tags.key)).encode("utf-8", "surrogateescape")
    return _EXPIRY.pack(expires_at) + len(words).to_bytes(2) + words + value


def _unpacked(packed: bytes) -> tuple[bytes, CacheTags]:
    begin = _EXPIRY.size + 2
    end = begin + int.from_bytes(packed[_EXPIRY.size : begin])
    tenant, model, key = packed[begin:end].decode("utf-8", "surrogateescape").split("\0")
    return packed[end:], CacheTags(tenant, model, key)
