"""Writes the error book in the background: errors wait in memory until the database takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from headrace.error_tracking import ErrorCounts
from headrace.errors import StoreUnavailable
from headrace.ports import ErrorBook
from headrace.records import TrackedError

GATHER = 0.2
"""Seconds that an error waits for others."""
RETRY = 2.0
"""Seconds between attempts while the database is away."""


class ErrorWriter:
    """Call `add` on the event loop. What the database won't take is kept, up to as many fingerprints as the book has."""

    def __init__(self, book: ErrorBook) -> None:
        self._book = book
        self._waiting = ErrorCounts()
        self._due = asyncio.Event()

    def add(self, errors: Iterable[TrackedError]) -> None:
        for error in errors:
            self._waiting.add(error)
        self._due.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._due.wait()
            await asyncio.sleep(GATHER)
            if not await self._write():
                await asyncio.sleep(RETRY)

    async def finish(self, within: float) -> None:
        """A last attempt, of so many seconds, once `run` was cancelled."""
        if len(self._waiting):
            last = asyncio.create_task(self._write())
            await asyncio.wait((last,), timeout=within)
            last.cancel()
            await asyncio.gather(last, return_exceptions=True)

    async def _write(self) -> bool:
        """Whether nothing has to be tried again. What a commit of unknown end has written may be counted twice."""
        self._due.clear()
        errors = self._waiting.take()
        done = False
        try:
            await self._book.add(errors)
            done = True
        except StoreUnavailable:
            # No log line: it would be the next error to be written.
            pass
        finally:
            if not done:
                self.add(errors)
        return done
