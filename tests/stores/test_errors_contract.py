"""What the error book does, over all databases; and its writer while the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.error_tracking import tracked
from headrace.records import TrackedError
from headrace.stores.database import Database
from headrace.stores.error_writer import ErrorWriter
from headrace.stores.errors_sql import SqlErrors

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite:///{tmp_path}/headrace.db" if request.param == "sqlite" else request.getfixturevalue("empty_postgres_url")
    database = Database(url)
    yield database
    await database.close()


def error(code: str, at: float, **more: Any) -> TrackedError:
    made = tracked("api", code, at=at, route="/chat", model="m")
    return msgspec.structs.replace(made, **more)


async def test_errors_are_counted(database: Database) -> None:
    await database.migrate()
    book = SqlErrors(database)
    assert await book.newest() == []
    await book.add([])
    frames = ("headrace.a:f:1", "headrace.b:C.g:2")
    await book.add([error("x", 10, request_id="req_1", frames=frames, kind="ValueError"), error("y", 20)])
    await book.add([error("x", 30, count=4, frames=("headrace.a:f:7",)), error("z", 5)])
    x, y, z = await book.newest()
    assert (x.code, x.count, x.first_seen, x.last_seen, x.request_id, x.frames) == ("x", 5, 10, 30, "req_1", ("headrace.a:f:7",))
    assert (y.code, z.code) == ("y", "z")
    # What is told late doesn't replace what came after it.
    await book.add([error("x", 8, request_id="req_0", version="old")])
    x = (await book.newest(limit=1))[0]
    assert (x.count, x.first_seen, x.last_seen, x.request_id) == (6, 8, 30, "req_1")
    assert x.version != "old"
    assert [each.code for each in await book.newest(since=20)] == ["x", "y"]


async def test_the_book_has_an_end(database: Database) -> None:
    await database.migrate()
    book = SqlErrors(database, most=5)
    await book.add([error(f"e{number}", number) for number in range(4)])
    await book.add([error("e0", 50), *(error(f"f{number}", 10 + number) for number in range(4))])
    assert [each.code for each in await book.newest()] == ["e0", "f3", "f2", "f1", "f0"]


async def test_any_text_can_be_kept(database: Database) -> None:
    await database.migrate()
    book = SqlErrors(database)
    await book.add([error("x", 1, detail="a\0b\ud800" + "é" * 500, model="m" * 999)])
    kept = (await book.newest())[0]
    assert kept.detail.startswith("ab?éé")
    assert len(kept.detail) == len(kept.model) == 200


async def test_two_servers_share_a_book(database: Database) -> None:
    await database.migrate()
    book = SqlErrors(database)
    errors = [error(f"e{number}", number) for number in range(40)]
    await asyncio.gather(*(book.add(part) for part in (errors, errors[::-1]) * 4))
    assert {each.count for each in await book.newest(limit=100)} == {8}


async def test_errors_wait_for_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.stores.error_writer.RETRY", 0.02)
    database = Database(f"sqlite:///{tmp_path}/headrace.db")  # without tables, which looks to us like a database that is away
    book = SqlErrors(database)
    writer = ErrorWriter(book)
    writing = asyncio.create_task(writer.run())
    writer.add([error("x", 1)])
    await asyncio.sleep(0.3)
    writer.add([error("x", 2), error("y", 3)])
    await writer.finish(2)
    assert not writing.done()
    await database.migrate()
    async with asyncio.timeout(20):
        while len(found := await book.newest()) < 2:
            await asyncio.sleep(0.01)
    assert [(each.code, each.count) for each in found] == [("y", 1), ("x", 2)]
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    writer.add([error("z", 4)])
    await writer.finish(5)
    assert (await book.newest())[0].code == "z"
    await database.close()
