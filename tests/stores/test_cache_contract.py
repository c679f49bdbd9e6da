"""Every cache keeps the same promises: memory, SQLite, Redis, each plain and encrypted."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StoreUnavailable
from headrace.ports import Cache, Sized
from headrace.records import CacheTags
from headrace.stores.cache_memory import MemoryCache
from headrace.stores.cache_redis import RedisCache
from headrace.stores.cache_sealed import SealedCache
from headrace.stores.cache_sqlite import SqliteCache, equal_share
from real_servers import RedisServer

pytestmark = pytest.mark.anyio

MIB = 1048576
ADA = CacheTags("ada", "small", "key_1")


@dataclass
class Clock:
    now: float

    def __call__(self) -> float:
        return self.now


@dataclass
class Made:
    cache: Cache
    pass_time: Callable[[float], None] | None
    """None where the store has a clock of its own."""


@pytest.fixture(params=["memory", "sqlite", "redis", "sealed-sqlite", "sealed-redis"])
async def made(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Made]:
    kind: str = request.param
    clock = Clock(1_800_000_000.0)

    def pass_time(seconds: float) -> None:
        clock.now += seconds

    cache: Cache
    if kind == "memory":
        cache = MemoryCache(MIB, clock=clock)
    elif kind.endswith("sqlite"):
        cache = SqliteCache(tmp_path / "deep" / "cache.db", MIB, clock=clock)
    else:
        cache = RedisCache(request.getfixturevalue("redis_url"))
        await cache.purge()
    if kind.startswith("sealed"):
        cache = SealedCache(cache, "a long enough secret")
    yield Made(cache, None if kind.endswith("redis") else pass_time)
    await cache.close()
    await cache.close()


async def test_a_value_comes_back_as_it_was_put(made: Made) -> None:
    value = bytes(range(256)) * 100
    assert await made.cache.get(b"one") is None
    await made.cache.put(b"one", value, ADA, 60)
    assert await made.cache.get(b"one") == value
    await made.cache.put(b"one", b"newer", ADA, 60)
    assert await made.cache.get(b"one") == b"newer"
    assert await made.cache.get(b"two") is None


async def test_keys_are_any_bytes(made: Made) -> None:
    keys = [bytes([n]) * 32 for n in range(256)]
    for key in keys:
        await made.cache.put(key, key[:1], ADA, 60)
    assert [await made.cache.get(key) for key in keys] == [key[:1] for key in keys]


async def test_a_value_has_a_lifetime(made: Made) -> None:
    if made.pass_time is None:
        await made.cache.put(b"short", b"1", ADA, 0.05)
        await made.cache.put(b"long", b"2", ADA, 60)
        async with asyncio.timeout(10):
            while await made.cache.get(b"short") is not None:
                await asyncio.sleep(0.01)
    else:
        await made.cache.put(b"short", b"1", ADA, 10)
        await made.cache.put(b"long", b"2", ADA, 60)
        made.pass_time(9.9)
        assert await made.cache.get(b"short") == b"1"
        made.pass_time(0.2)
    assert await made.cache.get(b"short") is None
    assert await made.cache.get(b"long") == b"2"


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({}, set()),
        ({"tenant": "ada"}, {b"bob/small/"}),
        ({"model": "small"}, {b"ada/large/key_1"}),
        ({"key": "key_1"}, {b"ada/small/key_2", b"bob/small/"}),
        ({"tenant": "ada", "model": "small"}, {b"ada/large/key_1", b"bob/small/"}),
        ({"tenant": "ada", "model": "large", "key": "key_1"}, {b"ada/small/key_1", b"ada/small/key_2", b"bob/small/"}),
        ({"tenant": "nobody"}, {b"ada/small/key_1", b"ada/small/key_2", b"ada/large/key_1", b"bob/small/"}),
    ],
)
async def test_purges_drop_what_has_all_the_tags(made: Made, wanted: dict[str, str], left: set[bytes]) -> None:
    every = {b"ada/small/key_1", b"ada/small/key_2", b"ada/large/key_1", b"bob/small/"}
    for name in every:
        await made.cache.put(name, b"x", CacheTags(*name.decode().split("/")), 60)
    assert await made.cache.purge(**wanted) == len(every) - len(left)
    assert {name for name in every if await made.cache.get(name) is not None} == left
    assert await made.cache.purge(**wanted) == 0


async def test_it_says_how_full_it_is(made: Made) -> None:
    assert isinstance(made.cache, Sized)
    assert (await made.cache.size()).entries == 0
    for n in range(5):
        await made.cache.put(bytes([n]), b"x" * 100, ADA, 60)
    size = await made.cache.size()
    assert size.entries == 5
    assert size.bytes is None or size.bytes > 500


async def test_many_at_once(made: Made) -> None:
    async def one(n: int) -> bytes | None:
        await made.cache.put(n.to_bytes(4), b"v%d" % n, ADA, 60)
        return await made.cache.get(n.to_bytes(4))

    assert await asyncio.gather(*map(one, range(200))) == [b"v%d" % n for n in range(200)]


# What only some of them promise


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_no_tenant_pushes_out_what_others_have(kind: str, tmp_path: Path) -> None:
    clock = Clock(1_800_000_000.0)
    cache = MemoryCache(100_000) if kind == "memory" else SqliteCache(tmp_path / "cache.db", 100_000, clock=clock)
    for number in range(50):
        await cache.put(b"loud %d" % number, bytes(1500), CacheTags("loud", "m"), 60)
    for number in range(10):
        await cache.put(b"quiet %d" % number, bytes(1500), CacheTags("quiet", "m"), 60)
    clock.now += 10
    for number in range(50, 200):
        await cache.put(b"loud %d" % number, bytes(1500), CacheTags("loud", "m"), 60)
    assert all([await cache.get(b"quiet %d" % number) for number in range(10)])
    assert await cache.get(b"loud 199")
    assert await bytes_in(cache) <= 100_000
    # What is free is anybody's: the loud one has the rest.
    assert sum([await cache.get(b"loud %d" % number) is not None for number in range(200)]) > 30
    for number in range(10, 40):
        await cache.put(b"quiet %d" % number, bytes(1500), CacheTags("quiet", "m"), 60)
    assert sum([await cache.get(b"quiet %d" % number) is not None for number in range(40)]) >= 24
    assert await cache.purge(tenant="loud") >= 24
    assert (await cache.size()).entries == sum([await cache.get(b"quiet %d" % number) is not None for number in range(40)])
    await cache.close()


async def bytes_in(cache: MemoryCache | SqliteCache) -> int:
    used = (await cache.size()).bytes
    assert used is not None
    return used


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(0, 5000))
def test_shares_fill_the_whole_and_no_more(used: list[int], whole: int) -> None:
    share = equal_share(used, whole)
    kept = sum(min(size, share) for size in used)
    assert kept == sum(used) if sum(used) <= whole else whole - len(used) < kept <= whole


async def test_a_file_from_before_shares_is_used_on(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    cache = SqliteCache(path, MIB)
    await cache.put(b"one", b"x", ADA, 60)
    await cache.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP INDEX answers_1_of_tenant")
        database.execute("CREATE INDEX answers_1_used ON answers_1 (used_at, size)")
    cache = SqliteCache(path, MIB)
    assert await cache.get(b"one") == b"x"
    await cache.close()
    with closing(sqlite3.connect(path)) as database:
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE 'answers%'")}
    assert names == {"answers_1_of_tenant", "answers_1_expires"}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_the_least_recently_used_give_way_and_bytes_are_bounded(kind: str, tmp_path: Path) -> None:
    clock = Clock(1_800_000_000.0)
    most = 20_000
    cache = MemoryCache(most, clock=clock) if kind == "memory" else SqliteCache(tmp_path / "cache.db", most, clock=clock)
    for n in range(10):
        await cache.put(bytes([n]), b"x" * 1000, ADA, 10_000)
        clock.now += 100
    assert await cache.get(b"\0") is not None
    for n in range(10, 21):
        clock.now += 100
        await cache.put(bytes([n]), b"x" * 1000, ADA, 10_000)
        size = await cache.size()
        assert size.bytes is not None
        assert size.bytes <= most
    assert await cache.get(b"\0") is not None
    assert await cache.get(b"\1") is None
    assert await cache.get(bytes([20])) is not None
    await cache.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_poisonous_size_is_not_kept_and_takes_the_older_value_along(kind: str, tmp_path: Path) -> None:
    cache = MemoryCache(100_000) if kind == "memory" else SqliteCache(tmp_path / "cache.db", 100_000)
    await cache.put(b"other", b"x" * 1000, ADA, 60)
    await cache.put(b"big", b"old", ADA, 60)
    await cache.put(b"big", b"x" * 30_000, ADA, 60)
    assert await cache.get(b"big") is None
    assert await cache.get(b"other") is not None
    await cache.close()


async def test_sqlite_survives_its_process_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    first, beside = SqliteCache(path, MIB), SqliteCache(path, MIB)
    await first.put(b"one", b"value", ADA, 60)
    assert await beside.get(b"one") == b"value"
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"cache.db": 0o600, "cache.db-wal": 0o600, "cache.db-shm": 0o600}
    await first.close()
    await beside.close()
    again = SqliteCache(path, MIB)
    assert await again.get(b"one") == b"value"
    await again.close()


async def test_a_file_that_is_none_of_ours_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(b"this is no database at all" * 100)
    cache = SqliteCache(path, MIB)
    with pytest.raises(StoreUnavailable):
        await cache.get(b"one")
    path.unlink()
    await cache.put(b"one", b"value", ADA, 60)
    assert await cache.get(b"one") == b"value"
    await cache.close()


async def test_what_is_sealed_shows_nothing_and_another_secret_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    plain = SqliteCache(path, MIB)
    sealed = SealedCache(plain, "the first secret of ours")
    await sealed.put(b"the-key-in-plain", b"an answer that is private" * 50, ADA, 60)
    assert await plain.get(b"the-key-in-plain") is None
    assert await SealedCache(plain, "another secret, as long").get(b"the-key-in-plain") is None
    assert await SealedCache(plain, "the first secret of ours").get(b"the-key-in-plain") == b"an answer that is private" * 50
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"private" not in stored
    assert b"the-key-in-plain" not in stored
    await plain.close()


async def test_what_somebody_changed_is_as_if_it_were_not_there() -> None:
    memory = MemoryCache(MIB)
    sealed = SealedCache(memory, "a long enough secret")
    await sealed.put(b"one", b"value", ADA, 60)
    await sealed.put(b"two", b"value", ADA, 60)
    (first, one), (second, two) = ((name, entry.value) for name, entry in memory._entries.items())
    await memory.put(first, two, ADA, 60)
    await memory.put(second, two[:-1] + bytes([two[-1] ^ 1]), ADA, 60)
    assert await sealed.get(b"one") is None
    assert await sealed.get(b"two") is None
    await memory.put(first, one[:5], ADA, 60)
    assert await sealed.get(b"one") is None


async def test_redis_that_stops_is_an_error_and_comes_back() -> None:
    with RedisServer() as server:
        cache = RedisCache(server.url)
        await cache.put(b"one", b"value", ADA, 60)
        server.stop()
        with pytest.raises(StoreUnavailable):
            await cache.get(b"one")
        with pytest.raises(StoreUnavailable):
            await cache.purge()
        server.start()
        assert await cache.get(b"one") == b"value"
        await cache.close()
