"""What the limits in Redis are still to hear of, in files: a living process's while Redis is away, and all that the dead left untold.

Asks are kept as lines of JSON. Telling one twice changes nothing (`limits.lua`), so files are removed only once all of them was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from headrace.claims import RECENT, Ask, Renew, Settle
from headrace.errors import StoreUnavailable
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import MOST_AT_ONCE

OWED = "owed"
"""The file's name in the folder of a living process."""
TIMEOUT = 5.0
"""Seconds for an exchange; nobody waits for it."""
REMEMBERED = 100.0
"""Seconds for which Redis surely knows that a lease was settled (`limits.lua`)."""
FIRST_PAUSE, LAST_PAUSE = 0.5, 10.0
"""Seconds between attempts while Redis is away."""

LOOK = 2.0
"""Seconds between looks at whether Redis still knows what it was told."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Ask).decode


class OwedFile:
    """One living process's. What was added survives the kill of the process, not that of the machine: for that there is the ledger."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def add(self, ask: Ask) -> None:
        """Raises `OSError`."""
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(self._descriptor, _encode(ask) + b"\n")

    def clear(self) -> None:
        """All of it was told."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._path.unlink(missing_ok=True)


def read_owed(path: Path) -> list[Ask]:
    """In the order in which they were added; nothing where there is no file. A line that a death or a full disk cut off is left out."""
    asks = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                asks.append(_decode(line))
    return asks


class OwedByTheDead:
    """A folder of what dead processes had to tell, until it is told: also after a restart, however long Redis was away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wanted = asyncio.Event()
        self._last = 0
        self._told = False

    def add(self, asks: Iterable[Ask]) -> None:
        """Returns once they are on the disk. Raises `OSError`."""
        lines = b"".join(_encode(ask) + b"\n" for ask in asks)
        if not lines:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._last = max(time.time_ns(), self._last + 1)
        making = self._folder / f".{self._last:020}-{os.getpid()}"
        try:
            with open(making, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            making.unlink(missing_ok=True)
            raise
        making.rename(self._folder / f"{self._last:020}-{os.getpid()}.jsonl")
        self._wanted.set()

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._folder.glob("[!.]*.jsonl"))

    async def tell(self, url: str) -> None:
        """Tell Redis all there is. Raises `StoreUnavailable`; what was told until then needn't be told again, and does no harm."""
        place = RedisLimits(url, timeout=TIMEOUT)
        try:
            await self._tell(place)
        finally:
            await place.close()

    async def _tell(self, place: RedisLimits) -> None:
        for path in await asyncio.to_thread(self.files):
            asks = [_by_now(ask, time.time()) for ask in await asyncio.to_thread(read_owed, path)]
            for at in range(0, len(asks), MOST_AT_ONCE):
                await place.exchange(asks[at : at + MOST_AT_ONCE])
            await asyncio.to_thread(path.unlink, missing_ok=True)
            self._told = True

    async def run(self, url: Callable[[], str]) -> None:
        """Tell it when there is something, and again while Redis is away, until cancelled. `url`: as configured now.

        Redis may forget what it was told when it crashes; maybe nobody else has talked to it in between who could find that out.
        """
        place: RedisLimits | None = None
        try:
            of, pause = "", FIRST_PAUSE
            while True:
                self._wanted.clear()
                if url() != of:
                    if place is not None:
                        await place.close()
                    of = url()
                    place = None if of == "memory://" else RedisLimits(of, timeout=TIMEOUT)
                pause = await self._tell_or_wait(place, pause)
        finally:
            if place is not None:
                await place.close()

    async def _tell_or_wait(self, place: RedisLimits | None, pause: float) -> float:
        """The pause that comes next, should it fail then."""
        try:
            if place is not None:
                await self._tell(place)
                if self._told:
                    await place.exchange([Renew(())])
        except (StoreUnavailable, OSError) as error:
            if pause == FIRST_PAUSE:
                structlog.get_logger("headrace.limits").warning("what dead processes used waits for Redis", reason=str(error))
            await asyncio.sleep(pause)
            return min(2 * pause, LAST_PAUSE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wanted.wait(), LOOK if self._told else None)
        return FIRST_PAUSE


def _by_now(ask: Ask, now: float) -> Ask:
    """What a process may well have told itself, so long ago that Redis wouldn't know: a lease that is still there says that it hadn't."""
    if isinstance(ask, Settle) and ask.life == RECENT and now - ask.ended > REMEMBERED:
        return Settle(ask.id, ask.used)
    return ask
