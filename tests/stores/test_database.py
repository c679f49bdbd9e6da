from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from headrace.errors import ConfigError, StoreUnavailable
from headrace.stores.database import Database
from real_servers import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/headrace.db"
    found: str = request.getfixturevalue("empty_postgres_url")
    return found


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    await made.migrate()
    yield made
    await made.close()


async def test_migrating_twice_changes_nothing(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("UPDATE key_changes SET version = 7"))
    await database.migrate()
    async with database.session(read_only=True) as session:
        assert (await session.execute(text("SELECT version FROM key_changes"))).scalars().all() == [7]


@pytest.mark.slow
def test_several_starters_migrate_once(url: str) -> None:
    program = "import asyncio, sys; from headrace.stores.database import Database; asyncio.run(Database(sys.argv[1]).migrate())"
    starters = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(4)]
    for starter in starters:
        _, said = starter.communicate(timeout=60)
        assert starter.returncode == 0, said.decode()


async def test_starters_in_one_process_wait_for_each_other(url: str) -> None:
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*(database.migrate() for database in databases))
    for database in databases:
        await database.close()


async def test_an_error_rolls_back(database: Database) -> None:
    async def fail() -> None:
        async with database.session() as session:
            await session.execute(text("UPDATE key_changes SET version = 9"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    async with database.session() as session:
        assert (await session.execute(text("SELECT version FROM key_changes"))).scalar() == 1


async def test_writers_wait_for_their_turn(database: Database) -> None:
    """Read, then write: with a lock taken late SQLite would refuse all but one."""

    async def add_one() -> None:
        async with database.session() as session:
            suffix = "" if database.is_sqlite else " FOR UPDATE"
            seen = (await session.execute(text(f"SELECT version FROM key_changes{suffix}"))).scalar_one()
            await session.execute(text("UPDATE key_changes SET version = :next"), {"next": seen + 1})

    await asyncio.gather(*(add_one() for _ in range(20)))
    async with database.session(read_only=True) as session:
        assert (await session.execute(text("SELECT version FROM key_changes"))).scalar() == 21


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'nobody'",
        "DELETE FROM audit",
        "INSERT OR REPLACE INTO audit (id, at, actor, action, subject, tenant, details) VALUES (1, 0, '', '', '', '', '')",
        "TRUNCATE audit",
    ],
)
async def test_the_audit_log_can_only_grow(database: Database, statement: str) -> None:
    if database.is_sqlite != ("REPLACE" in statement) and statement.split()[0] in ("INSERT", "TRUNCATE"):
        pytest.skip("a statement of the other database")
    async with database.session() as session:
        await session.execute(
            text("INSERT INTO audit (at, actor, action, subject, tenant, details) VALUES (1, 'cli:ada', 'key.create', 'key_1', 'a', '{}')")
        )
    with pytest.raises(DBAPIError, match="append-only"):
        async with database.session() as session:
            await session.execute(text(statement))
    async with database.session() as session:
        assert (await session.execute(text("SELECT actor FROM audit"))).scalars().all() == ["cli:ada"]


async def test_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        database = Database(f"sqlite:///{tmp_path}/data/headrace.db")
        await database.migrate()
        async with database.session() as session:
            await session.execute(text("UPDATE key_changes SET version = 2"))
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
        await database.close()
    finally:
        os.umask(before)
    assert modes.pop("headrace.db") == 0o600
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


async def test_a_newer_servers_database_is_refused(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("UPDATE headrace_migrations SET version_num = 'keys_9999' WHERE version_num LIKE 'keys%'"))
    with pytest.raises(ConfigError, match="newer"):
        await database.migrate()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://h/d", "sqlite://", "sqlite:///:memory:"])
async def test_urls_that_are_no_database_of_ours(url: str) -> None:
    with pytest.raises(ConfigError):
        Database(url)


async def test_nobody_there() -> None:
    database = Database("postgresql://headrace:secret-word@127.0.0.1:1/db")
    for attempt in (database.migrate(), _use(database)):
        with pytest.raises(StoreUnavailable) as refused:
            await attempt
        assert "secret-word" not in refused.value.message
    await database.close()


@pytest.mark.slow
async def test_the_database_is_stopped_and_started() -> None:
    with PostgresServer() as server:
        database = Database(server.url)
        await database.migrate()
        await _use(database)
        server.stop()
        with pytest.raises(StoreUnavailable):
            await _use(database)
        server.start()
        await _use(database)
        server.kill()
        with pytest.raises(StoreUnavailable):
            await _use(database)
        server.start()
        await _use(database)
        await database.close()


async def _raise(database: Database, state: str) -> None:
    async with database.session() as session:
        await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}'; END $$"))


async def test_a_postgresql_that_cannot_now_is_away(empty_postgres_url: str) -> None:
    database = Database(empty_postgres_url)
    for state in ("57P03", "53300", "25006"):  # starting up, too many connections, a replica
        with pytest.raises(StoreUnavailable, match="so it is"):
            await _raise(database, state)
    with pytest.raises(DBAPIError):
        await _raise(database, "P0001")
    # Whatever it is that it refuses connections for, it can't be used.
    name = empty_postgres_url.rpartition("/")[2]
    other = Database(empty_postgres_url.removesuffix(name) + "postgres")
    async with other.session() as session:
        await session.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
    await database.close()
    with pytest.raises(StoreUnavailable):
        await _use(database)
    await database.close()
    await other.close()


async def _use(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("UPDATE key_changes SET version = version + 1"))
