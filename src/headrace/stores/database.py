"""The database: one engine for every store that lives in SQL, on SQLite or PostgreSQL by URL.

Heavy imports (SQLAlchemy's drivers, Alembic) happen when a `Database` is made or migrated.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from headrace.errors import ConfigError, StoreUnavailable
from headrace.stores.sqlite_pragmas import set_pragmas
from headrace.stores.sqlite_thread import PRAGMAS, SqliteThread

CONNECTIONS = 5
"""Most connections of one process."""
CONNECT_TIMEOUT = 3.0
"""Seconds to wait for a connection, from the server or from the pool."""
STATEMENT_TIMEOUT = 10.0
"""Seconds that one statement may take on PostgreSQL."""
LOCK_TIMEOUT = 5.0
"""Seconds that a writer waits for another process's transaction on SQLite."""
MIGRATION_TIMEOUT = 120.0
"""Seconds that a starter waits for another one that is migrating."""

_MIGRATION_LOCK = 0x6865616472616365
"""PostgreSQL's advisory lock; any number that no other program takes ("headrace" in ASCII)."""
_READING = "headrace_reading"

_NOT_NOW = ("08", "53", "57", "58", "25006")
"""PostgreSQL's SQLSTATEs, or classes of them: the connection broke, no room (memory, disk, connections), it starts or stops, its system
failed, it is a replica now."""


class Database:
    """One database, by URL: `sqlite:///FOLDER/FILE`, `postgresql://USER@HOST/NAME`.

    Nothing is opened before the first session. Raises `ConfigError` for a URL that can't be one, or whose driver isn't installed.
    """

    def __init__(self, url: str) -> None:
        self.url = _with_driver(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = _engine(self.url, LOCK_TIMEOUT)
        untranslated = () if self.is_sqlite else _drivers_own_errors()
        self._away: tuple[type[Exception], ...] = (OperationalError, InterfaceError, PoolTimeout, OSError, TimeoutError, *untranslated)
        """What is raised where the database can't be used now."""
        self._thread = SqliteThread(self.url.database or "", LOCK_TIMEOUT) if self.is_sqlite else None

    @property
    def dialect(self) -> Dialect:
        """For statements that are compiled once (`AsyncConnection.exec_driver_sql`)."""
        return self._engine.dialect

    @asynccontextmanager
    async def session(self, *, read_only: bool = False) -> AsyncIterator[AsyncConnection]:
        """One transaction, committed at the end, rolled back where an error leaves it.

        On SQLite it takes the write lock at once, unless it is `read_only`: a transaction that reads first and writes later would fail
        instead of waiting for its turn. Raises `StoreUnavailable` where the database is away, too slow, or its disk is full; what was
        written then may or may not be there, if the commit itself was cut off.
        """
        connected = False
        try:
            async with self._engine.connect() as connection:
                connected = True
                if read_only and self.is_sqlite:
                    connection = await connection.execution_options(**{_READING: True})
                async with connection.begin():
                    yield connection
        except self._away as error:
            raise self._unavailable(error) from error
        except DBAPIError as error:
            if connected and not error.connection_invalidated and not _is_servers_fault(error):
                raise
            raise self._unavailable(error) from error

    async def transact(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """One transaction on SQLite, and there only: `work` runs in a thread. Raises `StoreUnavailable` as `session` does."""
        assert self._thread is not None, "other databases have no connection to work on in a thread"
        try:
            await self._thread.run(work)
        except (sqlite3.OperationalError, sqlite3.InterfaceError, OSError) as error:
            raise self._unavailable(error) from error

    async def migrate(self) -> None:
        """Bring the tables up to this version; several starters at once do it once.

        Raises `ConfigError` if a newer Headrace has been at this database, `StoreUnavailable` if it can't be reached.
        """
        if self.is_sqlite:
            _make_private(self.url)
        engine = _engine(self.url, MIGRATION_TIMEOUT)
        try:
            async with engine.connect() as connection, connection.begin():
                await connection.run_sync(_upgrade)
        except self._away as error:
            raise self._unavailable(error) from error
        except DBAPIError as error:
            raise self._unavailable(error) from error
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        await self._engine.dispose()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.close)

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        cause = getattr(error, "orig", None) or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        shown = self.url.render_as_string(hide_password=True)
        message = f"The database {re.sub(r'[+][a-z]+(?=:)', '', shown)} can't be used: {reason[:300]}"
        return StoreUnavailable(message, told="The server's database can't be used now.", retry_after=2)


def _drivers_own_errors() -> tuple[type[Exception], ...]:
    """What PostgreSQL's driver raises where SQLAlchemy doesn't translate: when a connection is lost while it is being made."""
    import asyncpg  # type: ignore[import-untyped]

    return asyncpg.PostgresError, asyncpg.InterfaceError


def _is_servers_fault(error: DBAPIError) -> bool:
    """Whether PostgreSQL says that it can't now, rather than that we asked for nonsense. SQLAlchemy has one class for both."""
    return str(getattr(error.orig, "sqlstate", None) or "").startswith(_NOT_NOW)


def _with_driver(text: str) -> URL:
    try:
        url = make_url(text)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise ConfigError("The database URL is not one; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.") from error
    if backend == "postgres":
        backend = "postgresql"
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigError("A SQLite database needs a file, which all processes share: sqlite:////var/lib/headrace/headrace.db.")
        return url.set(drivername="sqlite+aiosqlite", database=str(Path(url.database).expanduser()))
    if backend == "postgresql":
        return url.set(drivername="postgresql+asyncpg")
    raise ConfigError(f"{backend} is not a database that we know; there is sqlite and postgresql.")


def _engine(url: URL, lock_timeout: float) -> AsyncEngine:
    try:
        if url.get_backend_name() == "sqlite":
            engine = create_async_engine(
                url,
                pool_size=CONNECTIONS,
                max_overflow=0,
                pool_timeout=CONNECT_TIMEOUT,
                connect_args={"timeout": lock_timeout},
                hide_parameters=True,
            )
            event.listen(engine.sync_engine, "connect", lambda connection, record: _open_sqlite(connection, lock_timeout))
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
            return engine
        return create_async_engine(
            url,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT,
            # After a restart of the server the first statement on an old connection would fail.
            pool_pre_ping=True,
            connect_args={
                "timeout": CONNECT_TIMEOUT,
                "command_timeout": max(STATEMENT_TIMEOUT, lock_timeout),
                "server_settings": {"application_name": "headrace"},
            },
            hide_parameters=True,
        )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        extra = "postgres" if url.get_backend_name() == "postgresql" else ""
        raise ConfigError(f"The database's driver is not installed: pip install 'headrace[{extra}]'.") from error


def _open_sqlite(connection: Any, lock_timeout: float) -> None:
    # Transactions begin where we say (`_begin_sqlite`), not where Python's driver guesses.
    connection.isolation_level = None
    cursor = connection.cursor()
    set_pragmas(cursor, PRAGMAS, lock_timeout)
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _make_private(url: URL) -> None:
    """The database's file, for this user alone from its first moment; SQLite gives the files beside it the same mode."""
    path = Path(url.database or "")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"The database {path} can't be opened: {error.strerror}.") from error


def _upgrade(connection: Connection) -> None:
    """Run what is missing, within the connection's transaction: all of it or nothing.

    On SQLite that transaction holds the write lock, on PostgreSQL an advisory lock: another starter waits, and then finds it done.
    """
    from alembic.config import Config as AlembicConfig
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(MIGRATION_TIMEOUT * 1000)}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)

    def missing(revision: Any, context: Any) -> Any:
        return scripts._upgrade_revs("heads", revision)

    try:
        with EnvironmentContext(config, scripts, fn=missing, destination_rev="heads") as environment:
            environment.configure(connection=connection, transactional_ddl=True, version_table="headrace_migrations")
            environment.run_migrations()
    except CommandError as error:
        raise ConfigError(f"This database was last used by a newer Headrace, and can't be used by this one: {error}.") from error
