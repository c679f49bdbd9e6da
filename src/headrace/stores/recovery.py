"""Settling what dead API processes left: first their journals go into the ledger, then their open rows are settled from their slots."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from headrace.claims import Ask
from headrace.errors import StoreUnavailable
from headrace.ports import Ledger
from headrace.records import UsageRow
from headrace.stores.bookkeeper import Pricing
from headrace.stores.journal import files, read
from headrace.stores.limits_owed import OWED, read_owed
from headrace.stores.replay import GROUP, TIMEOUT, replay
from headrace.stores.slots import LeftSlots

ROUND = 5.0
"""Seconds between looks at what may have been left."""
RETRY = 0.2
"""Seconds between looks right after a death, of which there are so many: """
SOON = 10
AWAY = 2.0
"""Seconds until a database that is away is tried again."""
STALE = 3600.0
"""Seconds after which nobody is still making a folder."""
LATELY = 60.0
"""Seconds: what the dead had settled by then they had surely told the limits, or kept for them."""


class Recovery:
    """Over the folder in which every `Bookkeeper` of this machine has its own.

    Living API processes, of this server or of another one, are never touched: they hold a lock.
    """

    def __init__(self, ledger: Ledger, folder: Path, pricing: Pricing = lambda row: None) -> None:
        self._ledger = ledger
        self._folder = folder
        self._pricing = pricing
        self.told: Callable[[list[UsageRow]], None] | None = None
        """Hears of rows once they are settled, also of those that the dead had settled in their journal or a little before their death:
        nobody may have been told."""
        self.owed: Callable[[list[Ask]], None] | None = None
        """Hears before that of what the dead had kept for the limits. It is forgotten here when this returns."""
        self.over: Callable[[str], None] | None = None
        """Hears last, of each writer that has died, that all of its bills were told: what it began without one, no engine was asked for."""
        self._found: dict[str, float] = {}
        """When writers were first found dead."""
        self._wanted = asyncio.Event()
        self._going: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("headrace.ledger")

    def price_by(self, pricing: Pricing) -> None:
        """Other prices from now on."""
        self._pricing = pricing

    def want(self) -> None:
        """An API process has died."""
        self._wanted.set()

    async def run(self) -> None:
        """Recover when it is wanted, and now and then, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), ROUND)
                self._wanted.clear()
                # Who was killed lets go of its lock a moment later; a worker, when it has cancelled what nobody wants any more.
                for _ in range(SOON):
                    await self._settle_all()
                    await asyncio.sleep(RETRY)
            await self._settle_all()

    async def once(self, within: float) -> None:
        """Recover, for so many seconds; what takes longer goes on beside whatever comes next."""
        going = asyncio.create_task(self._settle_all(), name="recovery")
        self._going.add(going)
        going.add_done_callback(self._going.discard)
        # Not cancelled: SQLite's driver may lose the connection then, and the task with it.
        await asyncio.wait((going,), timeout=within)
        if going.done():
            going.result()
        else:
            self._log.warning("bills of dead processes are not settled yet")

    async def _settle_all(self) -> None:
        while True:
            try:
                for folder in sorted(self._folder.glob("[!.]*/")):
                    await self.settle(folder)
                self._sweep()
            except (StoreUnavailable, TimeoutError, OSError) as error:
                self._log.warning("bills of dead processes wait", reason=str(error))
                await asyncio.sleep(AWAY)
            else:
                return

    def _sweep(self) -> None:
        """Remove what processes left that died while they were making their folder: nothing was written there yet."""
        for making in self._folder.glob(".*/"):
            with contextlib.suppress(OSError):
                if time.time() - making.stat().st_mtime > STALE:
                    shutil.rmtree(making)

    async def settle(self, folder: Path) -> bool:
        """Settle what the API process of that folder left, and remove it. False while it lives, or a worker counts for it.

        Doing it again, after a death in the middle of it, changes nothing that was done. Raises `StoreUnavailable` and `TimeoutError`.
        """
        try:
            left = LeftSlots.claim(folder / "slots")
        except FileNotFoundError:
            shutil.rmtree(folder, ignore_errors=True)
            return True
        if left is None:
            return False
        try:
            if self.owed is not None and (owed := await asyncio.to_thread(read_owed, folder / OWED)):
                self.owed(owed)
                # At once: the rest may have to wait for the database, longer than Redis knows that it has heard of it.
                await asyncio.to_thread((folder / OWED).unlink, missing_ok=True)
            found = self._found.setdefault(folder.name, time.time())
            if self.told is not None and (lately := await self._ledger.settled_rows(folder.name, found - LATELY)):
                self.told(lately)
            journal = files(folder)
            replayed = await asyncio.to_thread(_settled_in, journal)
            await replay(self._ledger, journal)
            if replayed and self.told is not None:
                self.told(replayed)
            rows = await self._ledger.open_rows(folder.name)
            for at in range(0, len(rows), GROUP):
                settled = [self._settled(row, left) for row in rows[at : at + GROUP]]
                async with asyncio.timeout(TIMEOUT):
                    await self._ledger.write([], settled)
                if self.told is not None:
                    self.told(settled)
            if rows:
                self._log.info("bills settled", rows=len(rows), writer=folder.name)
            if self.over is not None:
                self.over(folder.name)
            self._found.pop(folder.name, None)
            # The slots last: as long as they are there, somebody will come and look at the rest.
            (folder / "slots").unlink()
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            left.close()
        return True

    def _settled(self, row: UsageRow, left: LeftSlots) -> UsageRow:
        counts = left.counts(row.id)
        row = msgspec.structs.replace(
            row,
            prompt_tokens=counts.prompt,
            cached_tokens=counts.cached,
            completion_tokens=counts.completion,
            status="interrupted",
            settled_at=time.time(),
        )
        return msgspec.structs.replace(row, price=self._pricing(row))


def _settled_in(journal: Sequence[Path]) -> list[UsageRow]:
    return [row for path in journal for row in read(path) if row.settled_at is not None]
