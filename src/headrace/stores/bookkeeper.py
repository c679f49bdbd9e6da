"""One API process's hand in the ledger: rows are written ahead in groups, and settled from what engines counted.

A row goes through four states. It is *opened*: it waits with others for one commit, and its request waits for that. Engines *count* for
it, in a slot. Its caller is *done* with it, after which an engine may still be making a token or two. When both are over it is *settled*,
again with others, and nobody waits; the slot is free once that is durable. A process that dies at any point leaves slots and journal, and
`recovery` does the rest.

While the database is away both kinds of writing go to the journal, which is replayed when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from headrace.errors import HeadraceError, StoreUnavailable
from headrace.ports import Ledger
from headrace.records import UsageRow
from headrace.stores.journal import Journal
from headrace.stores.limits_owed import OWED
from headrace.stores.replay import replay
from headrace.stores.slots import SlotFile
from headrace.types import Report

COMPANY = 0.05
"""Seconds that settlements wait for others, or for an opening to go with."""
SPACING = 0.01
"""Seconds from the beginning of a commit to that of the next, at least, where requests come in company. What a commit costs is a matter of
commits and hardly of rows: one for each of a thousand requests a second would take half a core."""
GROUP = 1000
"""Most rows in one commit."""
PATIENCE = 2.0
"""Seconds that the database may take for a commit before the journal is used instead."""
RETRY = 1.0
"""Seconds between attempts to reach a database that is away, or a disk that is full."""

Pricing = Callable[[UsageRow], int | None]
"""What a row costs, in 10⁻¹² of the currency's unit; None for a model without a price."""


@dataclass(slots=True)
class _Entry:
    """A request that is not settled yet."""

    slot: int
    engines: int = 0
    """That count for it now: 1, or 0."""
    counted: bool = False
    """An engine was asked."""
    report: Report | None = None
    done: UsageRow | None = None
    sharers: list[UsageRow] = field(default_factory=list)
    """Rows that were closed while the one generation that they share was under way or listened to, with their own counts."""
    others_listen: bool = False
    """More of them will come: whoever has taken over the bill."""
    unseen: int = 0
    """Tokens of completion that the engine made and none of those who share them saw."""


class Bookkeeper:
    """`ports.Books` for the journey, `ports.Meters` for the clients of engines.

    `folder` is where the API processes of this machine keep what must outlive them; this one makes a folder of its own in it. Call `start`
    before anything else, on the event loop. Raises `OSError` if the folder can't be had.
    """

    def __init__(self, ledger: Ledger, folder: Path, pricing: Pricing = lambda row: None, *, patience: float = PATIENCE) -> None:
        self.writer = secrets.token_hex(8)
        """The name that rows carry."""
        self._folder = folder / self.writer
        # Under another name until the lock is held: whoever recovers must never find it without.
        making = folder / f".{self.writer}"
        making.mkdir(mode=0o700, parents=True)
        self._slots = SlotFile(making / "slots")
        making.rename(self._folder)
        self._ledger = ledger
        self._pricing = pricing
        self._patience = patience
        self._journal = Journal(self._folder)
        self._entries: dict[str, _Entry] = {}
        self._opening: list[tuple[UsageRow, asyncio.Future[None]]] = []
        self.told: Callable[[UsageRow], None] | None = None
        """Hears of each row when its counts are final."""
        self._settling: list[tuple[UsageRow, int]] = []
        """With their slots; 0 is none."""
        self._in_hand = 0
        """Settlements that are being written."""
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._away = False
        self.away_told: Callable[[bool], None] | None = None
        """Hears when the database goes away, and when it is back."""
        self._writing: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._abandoned: set[asyncio.Future[None]] = set()
        """Commits that took too long."""
        self._closing = False
        self._log = structlog.get_logger("headrace.ledger")

    @property
    def path(self) -> str:
        return str(self._folder / "slots")

    @property
    def away(self) -> bool:
        """Whether bills go to the journal."""
        return self._away

    @property
    def unsettled(self) -> int:
        """Requests whose bill isn't durable yet."""
        return len(self._entries) + len(self._settling) + self._in_hand

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write_groups(), name="ledger")

    # The journey's side

    async def open(self, row: UsageRow) -> None:
        row = msgspec.structs.replace(row, writer=self.writer)
        entry = _Entry(self._slots.take(row.id))
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entries[row.id] = entry
        self._opening.append((row, durable))
        self._due.set()
        try:
            await durable
        except asyncio.CancelledError:
            # The row may be there by now.
            self.close(msgspec.structs.replace(row, status="cancelled"))
            raise
        except HeadraceError:
            del self._entries[row.id]
            self._slots.free(entry.slot)
            raise

    def close(self, row: UsageRow, shared_with: str = "", *, more: bool = False) -> None:
        if shared_with:
            first = self._entries.get(shared_with)
            if first is None:
                self._close_sharer(row, None)
                return
            if shared_with == row.id and not (more or first.engines or first.sharers):
                first.done = row  # nobody shared it
                self._finish(row.id, first)
                return
            # Until all have left, the slot is on the bill of the first: who dies now leaves one open row that has it all.
            first.sharers.append(row)
            first.others_listen = more
            self._maybe_finish_sharers(shared_with, first)
            return
        entry = self._entries.get(row.id)
        if entry is None:
            self._settle(row, 0)
            return
        entry.done = row
        if not entry.engines:
            self._finish(row.id, entry)

    # The engines' side

    def begin(self, request_id: str) -> int:
        entry = self._entries.get(request_id)
        if entry is None:
            return -1
        entry.engines += 1
        entry.counted = True
        return entry.slot

    def restart(self, request_id: str, delivered: int) -> int:
        entry = self._entries.get(request_id)
        if entry is None:
            return 0
        self._slots.rewind(entry.slot, delivered)
        return self._slots.read(entry.slot).cached

    def ended(self, request_id: str, report: Report | None, seen: int | None = None) -> None:
        entry = self._entries.get(request_id)
        if entry is None:
            return
        entry.engines -= 1
        if report is not None:
            entry.report = report
        if entry.engines:
            return
        if seen is not None:
            entry.unseen = self._slots.read(entry.slot).completion - seen
        if entry.sharers:
            self._maybe_finish_sharers(request_id, entry)
        elif entry.done is not None:
            self._finish(request_id, entry)

    def has_ended(self, request_id: str) -> bool:
        """Whether the engine's process itself has noted that nothing more comes."""
        entry = self._entries.get(request_id)
        return entry is None or self._slots.read(entry.slot).ended

    # Settling

    def _finish(self, request_id: str, entry: _Entry) -> None:
        del self._entries[request_id]
        row = entry.done
        assert row is not None
        if entry.counted:
            counts, report = self._slots.read(entry.slot), entry.report
            row = msgspec.structs.replace(
                row,
                prompt_tokens=counts.prompt,
                cached_tokens=counts.cached,
                completion_tokens=counts.completion,
                queue_ms=0.0 if report is None else report.queue_ms,
                prefill_ms=0.0 if report is None else report.prefill_ms,
                decode_ms=0.0 if report is None else report.decode_ms,
            )
        self._settle(row, entry.slot)

    def _maybe_finish_sharers(self, request_id: str, entry: _Entry) -> None:
        if not entry.engines and not entry.others_listen and any(row.id == request_id for row in entry.sharers):
            self._finish_sharers(request_id, entry)

    def _finish_sharers(self, request_id: str, entry: _Entry) -> None:
        rows, entry.sharers = entry.sharers, []
        *others, last = rows
        if entry.report is not None and not entry.unseen:
            # It was made to its end, and all had left before they had read that far.
            entry.unseen = max(0, self._slots.read(entry.slot).completion - sum(row.completion_tokens for row in rows))
        # The first one's slot is freed only once all that was counted in it is on somebody's bill.
        for row in sorted(others, key=lambda row: row.id == request_id):
            self._close_sharer(row, None)
        if not others and last.id == request_id:
            entry.done = last
            self._finish(request_id, entry)
        else:
            self._close_sharer(last, entry)

    def _close_sharer(self, row: UsageRow, entry: _Entry | None) -> None:
        """`entry`: that of the generation, if its unseen tokens are on this row's bill."""
        if entry is not None and entry.unseen:
            row = msgspec.structs.replace(row, completion_tokens=row.completion_tokens + entry.unseen)
            entry.unseen = 0
        own = self._entries.pop(row.id, None)
        self._settle(row, 0 if own is None else own.slot)

    def _settle(self, row: UsageRow, slot: int) -> None:
        row = msgspec.structs.replace(row, writer=self.writer, settled_at=time.time(), price=self._pricing(row))
        self._settling.append((row, slot))
        if self.told is not None:
            self.told(row)
        if self._closing or len(self._settling) >= GROUP:
            self._due.set()
        elif self._timer is None:
            self._wake_in(COMPANY)

    def _wake_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._due.set()

    # Writing

    async def _write_groups(self) -> None:
        now = asyncio.get_running_loop().time
        begun, company = 0.0, False
        while True:
            await self._due.wait()
            self._due.clear()
            while self._opening or self._settling:
                if company and not self._closing and (early := begun + SPACING - now()) > 0:
                    await asyncio.sleep(early)
                begun, company = now(), len(self._opening) > 1
                opening, self._opening = self._opening[:GROUP], self._opening[GROUP:]
                settling, self._settling = self._settling[:GROUP], self._settling[GROUP:]
                self._in_hand = len(settling)
                try:
                    await self._make_durable([row for row, _ in opening], [row for row, _ in settling])
                except Exception as error:  # noqa: BLE001  the writer's edge: it must live, and whoever waits must hear of it
                    self._refuse(opening, error)
                    self._settling = settling + self._settling
                    self._wake_in(RETRY)
                    if not self._opening:
                        break
                else:
                    for _, durable in opening:
                        if not durable.done():
                            durable.set_result(None)
                    for _, slot in settling:
                        if slot:
                            self._slots.free(slot)
                finally:
                    self._in_hand = 0

    async def _make_durable(self, opened: list[UsageRow], settled: list[UsageRow]) -> None:
        """In the database, or else in the journal. Raises `OSError` where neither will have them."""
        if not self._away:
            try:
                await self._write_in_time(opened, settled)
                return
            except (StoreUnavailable, TimeoutError) as error:
                self._go_away(error)
        await asyncio.to_thread(self._journal.append, [*opened, *settled])

    async def _write_in_time(self, opened: list[UsageRow], settled: list[UsageRow]) -> None:
        """Raises `TimeoutError`; what is under way then may still arrive, and changes nothing that was written meanwhile."""
        writing = asyncio.ensure_future(self._ledger.write(opened, settled))
        try:
            await asyncio.wait((writing,), timeout=self._patience)
        finally:
            if not writing.done():
                # Never cancelled: SQLite's driver may lose the connection then, and the task with it. Its own time limits end it.
                self._abandoned.add(writing)
                writing.add_done_callback(self._forget_abandoned)
        if not writing.done():
            raise TimeoutError
        writing.result()

    def _forget_abandoned(self, writing: asyncio.Future[None]) -> None:
        self._abandoned.discard(writing)
        if not writing.cancelled() and (error := writing.exception()) is not None:
            self._log.debug("an abandoned commit failed", reason=str(error))

    def _refuse(self, opening: list[tuple[UsageRow, asyncio.Future[None]]], error: Exception) -> None:
        self._log.error("usage can't be written", reason=f"{type(error).__name__}: {error}", refused=len(opening))
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "see the server's log"
        for _, durable in opening:
            if not durable.done():
                durable.set_exception(StoreUnavailable(f"The request can't be put on the bill now ({reason}).", retry_after=5))

    # The database away, and back

    def _is_away(self, away: bool) -> None:
        if away != self._away:
            self._away = away
            if self.away_told is not None:
                self.away_told(away)

    def _go_away(self, error: Exception) -> None:
        reason = error.message if isinstance(error, HeadraceError) else f"no commit within {self._patience:g} s"
        self._log.warning("database away: usage goes to the journal", reason=reason)
        self._is_away(True)
        if self._returning is None or self._returning.done():
            self._returning = asyncio.create_task(self._come_back(), name="ledger replay")

    async def _come_back(self) -> None:
        """Replay the journal until nothing is left of it and the database takes rows again."""
        while True:
            await asyncio.sleep(RETRY)
            paths = await asyncio.to_thread(self._journal.rotate)
            try:
                if paths:
                    await replay(self._ledger, paths)
                else:
                    await self._write_in_time([], [])
            except (StoreUnavailable, TimeoutError, OSError):
                self._is_away(True)
                continue
            if self._away:
                self._is_away(False)
                self._log.info("database back: the journal is replayed", files=len(paths))
            elif not paths:
                return

    # The end

    async def close_books(self, within: float = 5.0) -> None:
        """Settle everything; what can't be settled in time, in seconds, is left to whoever recovers. Idempotent."""
        if self._writing is None:
            return
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self.unsettled or (not self._away and self._returning is not None and not self._returning.done()):
                    self._due.set()
                    await asyncio.sleep(0.005)
        for task in (self._writing, self._returning):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._writing = None
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=within)
        self._journal.close()
        clean = not self.unsettled and not self._journal.rotate() and not (self._folder / OWED).exists()
        if clean:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._slots.close()
