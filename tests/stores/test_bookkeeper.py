from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.claims import Ask, Charge, Claim
from headrace.errors import StoreUnavailable
from headrace.records import UsageQuery, UsageRow
from headrace.stores import bookkeeper as module
from headrace.stores.bookkeeper import Bookkeeper
from headrace.stores.database import Database
from headrace.stores.journal import Journal, files, read
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.ledger_sql import SqlLedger
from headrace.stores.limits_owed import OWED, OwedFile
from headrace.stores.recovery import Recovery
from headrace.stores.slots import SharedSlots
from headrace.types import Report

pytestmark = pytest.mark.anyio


class Ledger(MemoryLedger):
    """Remembers its commits, can be held up, and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[tuple[int, int]] = []
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, opened: Sequence[UsageRow], settled: Sequence[UsageRow]) -> None:
        await self.gate.wait()
        if self.away:
            raise StoreUnavailable("The database is away.")
        self.commits.append((len(opened), len(settled)))
        await super().write(opened, settled)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def books(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bookkeeper]:
    monkeypatch.setattr(module, "RETRY", 0.02)
    made = Bookkeeper(ledger, tmp_path, lambda row: 3 * row.completion_tokens, patience=0.3)
    made.start()
    yield made
    await made.close_books(0.1)


def row(id: str, **more: Any) -> UsageRow:
    return UsageRow(id=id, opened_at=1000.0, tenant="t", model="m", **more)


async def until(condition: Callable[[], Any], within: float = 10) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_row_is_there_before_open_returns_and_settled_with_the_engines_counts(books: Bookkeeper, ledger: Ledger) -> None:
    await books.open(row("a"))
    assert ledger.rows["a"].settled_at is None
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("a"))
    counter.prompt(7, 2)
    counter.add(4)
    counter.end(Report(7, 2, 5, 1.0, 2.0, 3.0))
    books.ended("a", Report(7, 2, 5, 1.0, 2.0, 3.0))
    books.close(row("a", status="ok", finish="stop", completion_tokens=99))
    await until(lambda: ledger.rows["a"].settled_at)
    found = ledger.rows["a"]
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (7, 2, 5)
    assert (found.queue_ms, found.prefill_ms, found.decode_ms, found.price, found.finish) == (1.0, 2.0, 3.0, 15, "stop")
    assert books.unsettled == 0
    shared.close()


async def test_many_share_one_commit(books: Bookkeeper, ledger: Ledger) -> None:
    ledger.gate.clear()
    first = asyncio.create_task(books.open(row("first")))
    await asyncio.sleep(0)
    others = [asyncio.create_task(books.open(row(str(number)))) for number in range(200)]
    for _ in range(5):
        await asyncio.sleep(0)
    ledger.gate.set()
    await asyncio.gather(first, *others)
    assert len(ledger.commits) <= 2
    for number in range(200):
        books.close(row(str(number)))
    await until(lambda: books.unsettled == 1)
    assert len(ledger.commits) <= 4


async def test_a_hang_up_pays_for_what_the_engine_made_until_it_stopped(books: Bookkeeper, ledger: Ledger) -> None:
    await books.open(row("a"))
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("a"))
    counter.prompt(3, 0)
    counter.add(10)
    books.close(row("a", status="cancelled", completion_tokens=10))
    counter.add(1)
    assert ledger.rows["a"].settled_at is None, "the engine still counts"
    counter.end(Report(3, 0, 11, 0, 0, 5.0))
    books.ended("a", Report(3, 0, 11, 0, 0, 5.0), 10)
    await until(lambda: ledger.rows["a"].settled_at)
    assert (ledger.rows["a"].completion_tokens, ledger.rows["a"].status, ledger.rows["a"].decode_ms) == (11, "cancelled", 5.0)
    shared.close()


async def test_what_no_engine_was_asked_for_has_its_own_counts(books: Bookkeeper, ledger: Ledger) -> None:
    await books.open(row("refused"))
    books.close(row("refused", status="overloaded"))
    books.close(row("cached", status="cached", completion_tokens=2))
    await until(lambda: books.unsettled == 0)
    assert (ledger.rows["refused"].status, ledger.rows["refused"].completion_tokens) == ("overloaded", 0)
    assert (ledger.rows["cached"].status, ledger.rows["cached"].completion_tokens) == ("cached", 2)
    assert books.begin("never opened") == -1


async def test_a_caller_who_leaves_while_the_row_is_written_pays_nothing(books: Bookkeeper, ledger: Ledger) -> None:
    ledger.gate.clear()
    opening = asyncio.create_task(books.open(row("a", completion_tokens=0)))
    await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    ledger.gate.set()
    await until(lambda: "a" in ledger.rows and ledger.rows["a"].settled_at)
    assert ledger.rows["a"].status == "cancelled"
    assert books.unsettled == 0


async def test_those_who_share_a_generation_pay_for_each_token_once(books: Bookkeeper, ledger: Ledger) -> None:
    for name in ("first", "second", "third"):
        await books.open(row(name))
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("first"))
    counter.prompt(5, 0)
    counter.add(10)
    books.close(row("first", status="cancelled", prompt_tokens=5, completion_tokens=10), "first")
    counter.add(20)
    books.close(row("third", status="cancelled"), "first")
    books.close(row("second", status="cancelled", completion_tokens=20), "first")
    counter.add(2)
    counter.end(None)
    assert all(found.settled_at is None for found in ledger.rows.values())
    books.ended("first", None, 30)
    await until(lambda: books.unsettled == 0)
    assert {name: found.completion_tokens for name, found in ledger.rows.items()} == {"first": 10, "second": 22, "third": 0}
    assert sum(found.prompt_tokens for found in ledger.rows.values()) == 5
    shared.close()


async def test_sharers_who_stay_to_the_end_have_their_own_counts(books: Bookkeeper, ledger: Ledger) -> None:
    await books.open(row("first"))
    await books.open(row("second"))
    shared = SharedSlots(books.path)
    shared.counter(books.begin("first")).end(Report(5, 0, 8, 0, 0, 0))
    books.ended("first", Report(5, 0, 8, 0, 0, 0))
    books.close(row("second", status="ok"), "first")
    books.close(row("first", status="ok", prompt_tokens=5, completion_tokens=8), "first")
    await until(lambda: books.unsettled == 0)
    assert {name: found.completion_tokens for name, found in ledger.rows.items()} == {"first": 8, "second": 0}
    shared.close()


async def test_whoever_takes_the_bill_over_to_the_end_pays_the_rest_and_the_first_does_not_pay_it_again(
    books: Bookkeeper, ledger: Ledger
) -> None:
    for name in ("first", "second"):
        await books.open(row(name))
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("first"))
    counter.prompt(5, 0)
    counter.add(10)
    books.close(row("first", status="cancelled", prompt_tokens=5, completion_tokens=10), "first", more=True)
    counter.add(20)
    counter.end(Report(5, 0, 30, 0, 0, 0))
    books.ended("first", Report(5, 0, 30, 0, 0, 0))
    assert all(found.settled_at is None for found in ledger.rows.values()), "who dies now leaves one open row that has it all"
    books.close(row("second", status="ok", completion_tokens=20), "first")
    await until(lambda: books.unsettled == 0)
    assert {name: found.completion_tokens for name, found in ledger.rows.items()} == {"first": 10, "second": 20}
    assert sum(found.prompt_tokens for found in ledger.rows.values()) == 5
    shared.close()


async def test_what_a_generation_made_that_none_of_its_listeners_stayed_for_is_on_the_last_ones_bill(
    books: Bookkeeper, ledger: Ledger
) -> None:
    for name in ("first", "second"):
        await books.open(row(name))
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("first"))
    counter.prompt(5, 0)
    counter.add(30)
    counter.end(Report(5, 0, 30, 0, 0, 0))
    books.ended("first", Report(5, 0, 30, 0, 0, 0))
    books.close(row("first", status="cancelled", prompt_tokens=5, completion_tokens=10), "first", more=True)
    books.close(row("second", status="cancelled", completion_tokens=4), "first")
    await until(lambda: books.unsettled == 0)
    assert {name: found.completion_tokens for name, found in ledger.rows.items()} == {"first": 10, "second": 20}
    shared.close()


async def test_the_database_away_the_journal_has_it_and_is_replayed_once(books: Bookkeeper, ledger: Ledger, tmp_path: Path) -> None:
    await books.open(row("before"))
    ledger.away = True
    for number in range(50):
        await books.open(row(f"r{number}"))
    journalled = [found for path in files(tmp_path / books.writer) for found in read(path)]
    assert [found.id for found in journalled] == [f"r{number}" for number in range(50)]
    books.close(row("before", completion_tokens=1))
    for number in range(25):
        books.close(row(f"r{number}", completion_tokens=1))
    await until(lambda: books.unsettled == 25)
    assert books.away
    assert list(ledger.rows) == ["before"]
    ledger.away = False
    await until(lambda: not books.away and not files(tmp_path / books.writer))
    for number in range(25, 50):
        books.close(row(f"r{number}", completion_tokens=1))
    await until(lambda: books.unsettled == 0)
    (line,) = await ledger.usage(UsageQuery())
    assert (line.requests, line.completion_tokens, len(ledger.rows)) == (51, 51, 51)


async def test_a_database_that_hangs_is_not_waited_for(books: Bookkeeper, ledger: Ledger) -> None:
    ledger.gate.clear()
    async with asyncio.timeout(3):
        await books.open(row("a"))
    assert books.away
    async with asyncio.timeout(0.25):
        await books.open(row("b"))
    ledger.gate.set()
    await until(lambda: {"a", "b"} <= set(ledger.rows))


async def test_database_and_disk_gone_refuse_the_request_and_keep_the_bill(
    books: Bookkeeper, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await books.open(row("running"))
    slot = books.begin("running")
    ledger.away = True

    def full(self: Journal, rows: Sequence[UsageRow]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="No space left"):
                await books.open(row("refused"))
        shared = SharedSlots(books.path)
        shared.counter(slot).end(Report(1, 0, 6, 0, 0, 0))
        books.ended("running", None)
        books.close(row("running", status="ok"))
        with pytest.raises(StoreUnavailable):
            await books.open(row("refused"))
        assert books.unsettled == 1
    await books.open(row("room again"))
    ledger.away = False
    await until(lambda: ledger.rows["running"].settled_at)
    assert ledger.rows["running"].completion_tokens == 6
    assert "refused" not in ledger.rows
    shared.close()


async def test_a_lock_on_sqlite_sends_the_bill_to_the_journal_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", 0.02)
    url = f"sqlite:///{tmp_path}/headrace.db"
    database, other = Database(url), Database(url)
    await database.migrate()
    ledger = SqlLedger(database)
    books = Bookkeeper(ledger, tmp_path / "journal", patience=0.2)
    books.start()
    async with other.session():
        await books.open(row("a"))
        assert books.away
        books.close(row("a", completion_tokens=3))
        await until(lambda: books.unsettled == 0)
    await until(lambda: not books.away)
    await books.close_books()
    (line,) = await ledger.usage(UsageQuery())
    assert (line.requests, line.completion_tokens) == (1, 3)
    await database.close()
    await other.close()


async def test_books_that_are_in_order_leave_nothing(ledger: Ledger, tmp_path: Path) -> None:
    books = Bookkeeper(ledger, tmp_path)
    books.start()
    await books.open(row("a"))
    books.close(row("a"))
    await books.close_books()
    assert ledger.rows["a"].settled_at is not None
    assert list(tmp_path.iterdir()) == []


async def left_behind(ledger: Ledger, folder: Path) -> tuple[Bookkeeper, SharedSlots]:
    """An API process that dies with three requests: one asked of an engine, one not yet, one settled in the journal only."""
    books = Bookkeeper(ledger, folder, patience=0.3)
    books.start()
    for name in ("running", "waiting"):
        await books.open(row(name))
    ledger.away = True
    await books.open(row("journalled"))
    books.close(row("journalled", status="ok", completion_tokens=4))
    await until(lambda: books.unsettled == 2)
    shared = SharedSlots(books.path)
    counter = shared.counter(books.begin("running"))
    counter.prompt(5, 1)
    counter.add(9)
    for task in (books._writing, books._returning):
        assert task is not None
        task.cancel()
    return books, shared


async def test_recovery_settles_what_a_dead_process_left_and_only_then(ledger: Ledger, tmp_path: Path) -> None:
    books, shared = await left_behind(ledger, tmp_path)
    recovery = Recovery(ledger, tmp_path, lambda row: row.completion_tokens)
    told: list[UsageRow] = []
    recovery.told = told.extend
    over: list[tuple[str, int]] = []
    recovery.over = lambda writer: over.append((writer, len(told)))
    folder = tmp_path / books.writer
    assert not await recovery.settle(folder), "it lives"
    books._slots.close()
    assert not await recovery.settle(folder), "a worker still counts for it"
    shared.counter(1).add(2)
    shared.close()
    with pytest.raises(StoreUnavailable):
        await recovery.settle(folder)
    assert over == []
    ledger.away = False
    assert await recovery.settle(folder)
    assert over == [(books.writer, 3)], "after all of its bills"
    rows = ledger.rows
    assert {
        name: (found.prompt_tokens, found.cached_tokens, found.completion_tokens, found.price, found.status) for name, found in rows.items()
    } == {
        "running": (5, 1, 11, 11, "interrupted"),
        "waiting": (0, 0, 0, 0, "interrupted"),
        "journalled": (0, 0, 4, None, "ok"),
    }
    # Also of what was settled in the journal: the limits may not have heard of it.
    assert sorted((row.id, row.completion_tokens) for row in told) == [("journalled", 4), ("running", 11), ("waiting", 0)]
    assert list(tmp_path.iterdir()) == []


async def test_what_the_dead_had_kept_for_the_limits_is_handed_on_once_however_long_the_database_is_away(
    ledger: Ledger, tmp_path: Path
) -> None:
    books, shared = await left_behind(ledger, tmp_path)
    kept = OwedFile(tmp_path / books.writer / OWED)
    ask = Charge("owed", (Claim("key:a"),), 1, 7, 5.0)
    kept.add(ask)
    books._slots.close()
    shared.close()
    recovery = Recovery(ledger, tmp_path)
    handed: list[Ask] = []
    recovery.owed = handed.extend
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await recovery.settle(tmp_path / books.writer)
    assert handed == [ask]
    ledger.away = False
    assert await recovery.settle(tmp_path / books.writer)
    assert handed == [ask]
    os.close(kept._descriptor)


async def test_recovery_that_dies_half_way_is_done_again(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books, shared = await left_behind(ledger, tmp_path)
    books._slots.close()
    shared.close()
    ledger.away = False
    recovery = Recovery(ledger, tmp_path)
    folder = tmp_path / books.writer
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert await recovery.settle(folder)
    before = dict(ledger.rows)
    folder.mkdir()
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    await recovery.once(5)
    assert ledger.rows == before
    assert list(tmp_path.iterdir()) == []


async def test_rows_are_the_same_after_a_round_through_the_journal() -> None:
    whole = row("a", key="k", finish="stop", price=2**62, settled_at=3.5, queue_ms=0.1, writer="w", currency="€")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(whole), type=UsageRow) == whole


async def test_a_folder_whose_making_was_cut_off_is_removed_when_nobody_can_be_at_it(ledger: Ledger, tmp_path: Path) -> None:
    for name, age in ((".old", 7200.0), (".new", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "slots").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    await Recovery(ledger, tmp_path).once(5)
    assert [path.name for path in tmp_path.iterdir()] == [".new"]
