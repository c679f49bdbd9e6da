"""The cache in a SQLite file of its own, which all API processes of a machine share.

SQLAlchemy works in one thread of ours, not over aiosqlite: whatever has been asked for while the thread was busy is done in one go, so
that a look-up costs one hop to the thread and back (aiosqlite makes one for each of connect, begin, execute, fetch and rollback).
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    select,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from headrace.errors import StoreUnavailable
from headrace.records import CacheSize, CacheTags
from headrace.stores.lone_thread import LoneThread
from headrace.stores.sqlite_pragmas import set_pragmas

OVERHEAD = 256
"""Bytes that a row takes besides its value: the key, the tags, the index."""
LARGEST_SHARE = 4
"""A value over this part of the whole is not kept."""
LOCK_TIMEOUT = 1.0
"""Seconds to wait for another process's transaction."""
RECOUNT = 256
"""Puts between two looks at what other processes have added."""
ROOM = 0.9
"""What is left of a cache that has grown too large."""
COMPANY = 0.001
"""Seconds that the first to ask waits for others, where the last ones had company: to wake the thread costs more than what it does."""
USED_STEP = 60.0
"""Seconds between two notes that a row is being used: each would be a write."""

_metadata = MetaData()
_answers = Table(
    "answers_1",  # another number is another form of the table
    _metadata,
    Column("key", LargeBinary, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("tenant", String, nullable=False),
    Column("model", String, nullable=False),
    Column("api_key", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
    Index("answers_1_expires", "expires_at"),
)
_BY_TENANT = Index("answers_1_of_tenant", _answers.c.tenant, _answers.c.used_at, _answers.c.size)
"""It alone answers how much each tenant has, and which of it is oldest."""
_PUT = ("key", "value", "tenant", "model", "api_key", "size", "expires_at", "used_at")


def _driver_sql(statement: ClauseElement, parameters: Sequence[str]) -> str:
    """In the driver's words, with the values in the order of `parameters`. Each request asks for one look-up and one row to be kept, and
    SQLAlchemy takes several times as long to say so as SQLite to do it."""
    compiled = statement.compile(dialect=sqlite.dialect(), column_keys=parameters)
    assert isinstance(compiled, SQLCompiler)
    assert tuple(compiled.positiontup or ()) == tuple(parameters)
    return compiled.string


_insert = insert(_answers)
_find_sql = _driver_sql(
    select(_answers.c.value, _answers.c.expires_at, _answers.c.used_at).where(_answers.c.key == bindparam("key")), ("key",)
)
_put_sql = _driver_sql(
    _insert.on_conflict_do_update(index_elements=["key"], set_={name: _insert.excluded[name] for name in _PUT if name != "key"}), _PUT
)

_Work = Callable[[Connection], Any]


@dataclass(slots=True)
class _Asked:
    work: _Work
    writes: bool
    done: asyncio.Future[Any]


def equal_share(used: Iterable[int], whole: int) -> int:
    """Bytes that nobody may have more of, so that all fit into `whole`: what is left free by those who have less is the others'."""
    left = whole
    ascending = sorted(used)
    for place, size in enumerate(ascending):
        share = left // (len(ascending) - place)
        if size > share:
            return share
        left -= size
    return whole


class SqliteCache:
    """`ports.Cache` in the file `path` (mode 0600), of about `max_bytes`. Nothing is opened before the first use.

    Where it is full, those who have more than an equal share give way, their least recently used answers first: nobody can push out what
    other tenants have kept.

    `clock` is Unix time.
    """

    def __init__(self, path: Path, max_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._thread = LoneThread("cache")
        self._waiting: list[_Asked] = []
        self._busy = False
        """The thread has work, or is about to get it."""
        self._company = False
        self._closed = False
        # The thread's own:
        self._connection: Connection | None = None
        self._engine: Engine | None = None
        self._bytes = 0
        self._puts = 0
        self._used: dict[bytes, float] = {}
        """Rows that were read, to be noted with the next write: a transaction that begins as a reader may not be let write."""

    async def get(self, key: bytes) -> bytes | None:
        found: bytes | None = await self._do(lambda connection: self._get(connection, key), writes=False)
        return found

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        await self.put_many([(key, value, tags)], ttl)

    async def put_many(self, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
        await self._do(lambda connection: self._put(connection, values, ttl))

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        dropped: int = await self._do(lambda connection: self._purge(connection, tenant, model, key))
        return dropped

    async def size(self) -> CacheSize:
        entries, used = await self._do(self._count, writes=False)
        return CacheSize(entries, used)

    async def close(self) -> None:
        """What was asked for before is done first."""
        if not self._closed:
            with suppress(StoreUnavailable):
                await self._do(lambda connection: None, writes=False)
            self._closed = True
            await self._thread.do(self._disconnect)
            self._thread.close()

    # On the event loop

    async def _do(self, work: _Work, *, writes: bool = True) -> Any:
        if self._closed:
            raise StoreUnavailable("The cache is closed.")
        loop = asyncio.get_running_loop()
        asked = _Asked(work, writes, loop.create_future())
        self._waiting.append(asked)
        if not self._busy:
            self._busy = True
            if self._company:
                loop.call_later(COMPANY, self._start, loop)
            else:
                loop.call_soon(self._start, loop)
        return await asked.done

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        taken, self._waiting = self._waiting, []
        self._company = len(taken) > 1
        self._thread.give(partial(self._work, taken, loop))

    def _finished(self, results: list[tuple[asyncio.Future[Any], Any]], loop: asyncio.AbstractEventLoop) -> None:
        if self._waiting:
            self._start(loop)
        else:
            self._busy = False
        for future, result in results:
            if future.done():
                continue
            if isinstance(result, StoreUnavailable):
                future.set_exception(result)
            else:
                future.set_result(result)

    # In the thread

    def _work(self, taken: list[_Asked], loop: asyncio.AbstractEventLoop) -> None:
        try:
            connection = self._connected()
            driver = _driver(connection)
            driver.execute("BEGIN IMMEDIATE" if any(asked.writes for asked in taken) else "BEGIN")
            results = [(asked.done, asked.work(connection)) for asked in taken]
            driver.execute("COMMIT")
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            self._disconnect()
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            refused = StoreUnavailable(
                f"The cache {self._path} can't be used: {reason[:300]}", told="The server's cache can't be used now."
            )
            results = [(asked.done, refused) for asked in taken]
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._finished, results, loop)

    def _connected(self) -> Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # For this user alone from its first moment; SQLite gives the files beside it the same mode.
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            self._path.chmod(0o600)
            url = URL.create("sqlite", database=str(self._path))
            options = {"timeout": LOCK_TIMEOUT, "isolation_level": None, "check_same_thread": False}
            self._engine = create_engine(url, poolclass=NullPool, connect_args=options, hide_parameters=True)
            event.listen(self._engine, "connect", _open)
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                # Another process may find at the same moment that there are no tables yet.
                _driver(connection).execute("BEGIN IMMEDIATE")
                _metadata.create_all(connection)
                # Where the file was made before there were shares.
                connection.exec_driver_sql("DROP INDEX IF EXISTS answers_1_used")
                _BY_TENANT.create(connection, checkfirst=True)
                self._bytes = self._count(connection)[1]
                _driver(connection).execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.invalidate()
            connection.close()
        if self._engine is not None:
            self._engine.dispose()

    def _get(self, connection: Connection, key: bytes) -> bytes | None:
        row = _driver(connection).execute(_find_sql, (key,)).fetchone()
        now = self._clock()
        if row is None:
            return None
        value, expires_at, used_at = row
        if expires_at <= now:
            return None
        if now - used_at > USED_STEP:
            self._used[key] = now
        return bytes(value)

    def _put(self, connection: Connection, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
        now = self._clock()
        puts, rows = self._puts, []
        for key, value, tags in values:
            size = len(value) + OVERHEAD
            if size > self._max_bytes // LARGEST_SHARE:
                connection.execute(delete(_answers).where(_answers.c.key == key))
            else:
                rows.append((key, value, tags.tenant, tags.model, tags.key, size, now + ttl, now))
                self._bytes += size
        _driver(connection).executemany(_put_sql, rows)
        self._puts += len(rows)
        for used, at in self._used.items():
            connection.execute(update(_answers).where(_answers.c.key == used).values(used_at=at))
        self._used.clear()
        if self._bytes > self._max_bytes or self._puts // RECOUNT > puts // RECOUNT:
            self._make_room(connection, now)

    def _make_room(self, connection: Connection, now: float) -> None:
        connection.execute(delete(_answers).where(_answers.c.expires_at <= now))
        self._bytes = self._count(connection)[1]
        if self._bytes <= self._max_bytes:
            return
        sizes = select(_answers.c.tenant, func.sum(_answers.c.size)).group_by(_answers.c.tenant)
        used = {str(tenant): int(size) for tenant, size in connection.execute(sizes)}
        share = equal_share(used.values(), int(self._max_bytes * ROOM))
        oldest: list[bytes] = []
        for tenant, size in used.items():
            surplus = size - share
            found = select(_answers.c.key, _answers.c.size).where(_answers.c.tenant == tenant).order_by(_answers.c.used_at)
            for row in connection.execute(found) if surplus > 0 else ():
                if surplus <= 0:
                    break
                oldest.append(row.key)
                surplus -= row.size
                self._bytes -= row.size
        for begin in range(0, len(oldest), 500):
            connection.execute(delete(_answers).where(_answers.c.key.in_(oldest[begin : begin + 500])))

    def _purge(self, connection: Connection, tenant: str | None, model: str | None, key: str | None) -> int:
        wanted = {_answers.c.tenant: tenant, _answers.c.model: model, _answers.c.api_key: key}
        conditions = [column == value for column, value in wanted.items() if value is not None]
        dropped = connection.execute(delete(_answers).where(*conditions)).rowcount
        self._bytes = self._count(connection)[1]
        return dropped

    def _count(self, connection: Connection) -> tuple[int, int]:
        entries, used = connection.execute(select(func.count(), func.coalesce(func.sum(_answers.c.size), 0)).select_from(_answers)).one()
        return int(entries), int(used)


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def _open(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    set_pragmas(cursor, _PRAGMAS, LOCK_TIMEOUT)
    cursor.close()


_PRAGMAS = ("auto_vacuum = FULL", "journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON", "journal_size_limit = 4194304")
"""What the last moments before a power cut added may be lost, which a cache can bear; purged answers are overwritten."""
