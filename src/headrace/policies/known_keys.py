"""The keys that this API process knows: a cache before the store, which a change made anywhere reaches within a second.

Every change raises a version in the store. While requests come, the version is asked for every `REFRESH` seconds, and no request is
admitted on knowledge older than `STALE` seconds, unless the store is away: then what was known goes on for `ttl` seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from headrace.errors import StoreUnavailable
from headrace.logs import REQUEST_ID
from headrace.ports import Keys
from headrace.records import KnownKey

REFRESH = 0.3
STALE = 0.7
"""Seconds; with the time that a request takes to be admitted, revocation holds within one second."""
CHECK_TIMEOUT = 1.5
"""Seconds after which a store that doesn't answer counts as away."""
RETRY = 0.5
"""Seconds between attempts while it is away."""
MOST_KNOWN = 20_000
MOST_UNKNOWN = 4096

_Value = TypeVar("_Value")


class KnownKeys:
    """Keys by digest. `get` is for the warm cache and never waits; `find` asks the store where it must."""

    def __init__(
        self,
        keys: Keys,
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_met: Callable[[bytes], None] | None = None,
    ) -> None:
        self._keys = keys
        self._ttl = ttl
        self._clock = clock
        self._on_met = on_met
        self._known: dict[bytes, KnownKey] = {}
        self._unknown: dict[bytes, None] = {}
        self._version = 0
        self._confirmed = float("-inf")
        """When the last check that succeeded began."""
        self._checked = float("-inf")
        """When the last check began."""
        self._away = False
        self._checking: asyncio.Task[None] | None = None
        self._finding: dict[bytes, asyncio.Task[KnownKey | None]] = {}

    def get(self, digest: bytes) -> KnownKey | None:
        """The key, if it is known and the knowledge is fresh."""
        found = self._known.get(digest)
        if found is None:
            return None
        now = self._clock()
        age = now - self._confirmed
        if age < REFRESH:
            return found
        if self._checking is None and now - self._checked >= (RETRY if self._away else REFRESH):
            self._check_aside()
        return found if age < STALE or (self._away and age < self._ttl) else None

    async def find(self, digest: bytes) -> KnownKey | None:
        """The key, from the cache or the store; None if there is none. Raises `StoreUnavailable`."""
        if digest in self._known or digest in self._unknown:
            now = self._clock()
            if now - self._confirmed >= STALE and not (self._away and now - self._checked < RETRY):
                await asyncio.shield(self._checking or self._check_aside())
            if self._clock() - self._confirmed < (self._ttl if self._away else STALE):
                if digest in self._known:
                    return self._known[digest]
                if digest in self._unknown:
                    return None
        finding = self._finding.get(digest) or self._find_aside(digest, self._on_met)
        return await asyncio.shield(finding)

    def meet(self, digest: bytes) -> None:
        """Know a key that is in use in another API process, so that it goes on in this one, too, while the store is away."""
        if digest not in self._known and digest not in self._finding:
            self._find_aside(digest, None)

    def _find_aside(self, digest: bytes, on_met: Callable[[bytes], None] | None) -> asyncio.Task[KnownKey | None]:
        finding = self._finding[digest] = asyncio.create_task(self._ask(digest))
        finding.add_done_callback(lambda task: self._found(digest, task, on_met))
        return finding

    def _found(self, digest: bytes, task: asyncio.Task[KnownKey | None], on_met: Callable[[bytes], None] | None) -> None:
        del self._finding[digest]
        # Whoever waited has the error; a client that hung up, or another process, doesn't.
        if not task.cancelled() and task.exception() is None and task.result() is not None and on_met is not None:
            on_met(digest)

    async def _ask(self, digest: bytes) -> KnownKey | None:
        if not self._version:
            await asyncio.shield(self._checking or self._check_aside())
        for _ in range(5):
            version = self._version
            try:
                found = await asyncio.wait_for(self._keys.find(digest), CHECK_TIMEOUT * 2)
            except TimeoutError:
                raise StoreUnavailable("The database doesn't answer, and this key is not known yet.", retry_after=2) from None
            if version == self._version:
                break
            # Something changed meanwhile; it may have been this key, after it was read.
        if version and version == self._version:
            if found is not None:
                _keep(self._known, digest, found, MOST_KNOWN)
                self._unknown.pop(digest, None)
            else:
                _keep(self._unknown, digest, None, MOST_UNKNOWN)
        return found

    def _check_aside(self) -> asyncio.Task[None]:
        self._checking = asyncio.create_task(self._check())
        return self._checking

    async def _check(self) -> None:
        REQUEST_ID.set("")  # it works for all, whoever was the first
        began = self._checked = self._clock()
        try:
            changes = await asyncio.wait_for(self._keys.changes(self._version), CHECK_TIMEOUT)
        except (StoreUnavailable, TimeoutError) as error:
            if not self._away:
                self._away = True
                structlog.get_logger("headrace.keys").warning("keys can't be looked up; known ones go on for a while", reason=str(error))
            return
        finally:
            self._checking = None
        if self._away:
            self._away = False
            structlog.get_logger("headrace.keys").info("keys can be looked up again")
        if changes.version < self._version:  # another database has been put in its place
            self._known.clear()
            self._unknown.clear()
        elif changes.version > self._version:
            self._unknown.clear()
            if changes.keys or changes.tenants:
                for digest, known in list(self._known.items()):
                    if known.key.id in changes.keys or known.key.tenant in changes.tenants:
                        del self._known[digest]
        self._version = changes.version
        self._confirmed = began


def _keep(kept: dict[bytes, _Value], digest: bytes, value: _Value, most: int) -> None:
    if len(kept) >= most:
        del kept[next(iter(kept))]
    kept[digest] = value
