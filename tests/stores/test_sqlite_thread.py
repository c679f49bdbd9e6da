"""Transactions that run whole in a thread."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from headrace.errors import StoreUnavailable
from headrace.stores.database import Database
from headrace.stores.sqlite_thread import SqliteThread

pytestmark = pytest.mark.anyio


def create(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE t (x INTEGER PRIMARY KEY)")


@pytest.fixture
async def thread(tmp_path: Path) -> AsyncIterator[SqliteThread]:
    made = SqliteThread(str(tmp_path / "a.db"), timeout=0.05)
    await made.run(create)
    yield made
    made.close()


def insert(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO t DEFAULT VALUES")


def count(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


async def test_each_is_committed(thread: SqliteThread, tmp_path: Path) -> None:
    await asyncio.gather(*(thread.run(insert) for _ in range(10)))
    assert count(tmp_path / "a.db") == 10


async def test_one_that_fails_leaves_nothing(thread: SqliteThread, tmp_path: Path) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        insert(connection)
        raise ValueError

    with pytest.raises(ValueError):
        await thread.run(fail)
    assert count(tmp_path / "a.db") == 0
    await thread.run(insert)
    assert count(tmp_path / "a.db") == 1


async def test_whoever_stops_waiting_ends_nothing(thread: SqliteThread, tmp_path: Path) -> None:
    waiting = asyncio.ensure_future(thread.run(insert))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await thread.run(insert)
    assert count(tmp_path / "a.db") in (1, 2)  # it had begun, or not


async def test_another_processs_lock_is_an_error_after_its_time(thread: SqliteThread, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await thread.run(insert)
    await thread.run(insert)
    assert count(tmp_path / "a.db") == 1


async def test_what_can_not_be_written_is_a_store_that_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/none/there.db")
    with pytest.raises(StoreUnavailable, match="unable to open"):
        await database.transact(insert)
    await database.close()


async def test_bills_survive_the_loss_of_power(thread: SqliteThread) -> None:
    said: list[object] = []

    def ask(connection: sqlite3.Connection) -> None:
        said.extend(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))

    await thread.run(ask)
    assert said == ["wal", 2]
