from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from headrace.config import CacheSection, Config, ServerSection, StoreSection
from headrace.errors import ConfigError, StoreUnavailable
from headrace.records import CacheTags
from headrace.stores import cache_levels
from headrace.stores.cache_levels import READ_TIMEOUT, CacheLevels
from headrace.stores.cache_memory import MemoryCache
from headrace.stores.cache_open import open_cache
from headrace.stores.cache_redis import RedisCache
from headrace.stores.cache_sqlite import SqliteCache
from headrace.stores.cache_together import AT_ONCE, put_many
from real_servers import RedisServer

pytestmark = pytest.mark.anyio

MIB = 1048576
ADA = CacheTags("ada", "m", "key_1")
BOB = CacheTags("bob", "m")


def process(path: Path, **more: object) -> CacheLevels:
    """The levels of one API process of several."""
    return CacheLevels(MemoryCache(MIB), SqliteCache(path, MIB), name="sqlite", ttl=60, **more)  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def written(levels: CacheLevels, count: int) -> None:
    await until(lambda: levels.counts.writes == count)


async def test_what_one_process_keeps_another_finds_and_then_has_in_memory(tmp_path: Path) -> None:
    one, two = process(tmp_path / "c.db"), process(tmp_path / "c.db")
    one.keep(b"k", b"value", ADA)
    assert one.recall(b"k") == b"value"
    await written(one, 1)
    assert two.recall(b"k") is None
    assert await two.fetch(b"k") == (b"value", "sqlite")
    assert two.recall(b"k") == b"value"
    assert await two.fetch(b"other") is None
    assert (two.counts.second_hits, two.counts.memory_hits, two.counts.misses) == (1, 1, 1)
    assert {name: size.entries for name, size in (await two.sizes()).items() if size} == {"memory": 1, "sqlite": 1}
    await one.close()
    await two.close()


async def test_it_is_told_when_others_can_read_what_is_kept_and_who_is_in_a_hurry_waits_for_no_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_levels, "GATHER", 3600)
    one, two = process(tmp_path / "c.db"), process(tmp_path / "c.db")
    told: list[tuple[list[bytes], bool]] = []
    one.told = lambda keys, readable: told.append(([*keys], readable))
    assert one.shared
    for hurry in (one.hurry, lambda: None):  # before the group has begun to wait, and once it does
        one.keep(b"a", b"1", ADA)
        one.keep(b"b", b"2", ADA)
        assert not told
        hurry()
        await until(lambda: told or one._gathering is not None)
        one.hurry()
        await until(lambda: told)
        assert told == [([b"a", b"b"], True)]
        assert await two.fetch(b"a") == (b"1", "sqlite")
        told.clear()
    await until(lambda: one._gathering is not None)
    one.keep(b"c", b"3", ADA)
    await one.purge()
    assert told == [([b"c"], False)]
    one._rest_until = time.monotonic() + 60
    assert not one.shared
    one.keep(b"d", b"4", ADA)
    assert told[1:] == [([b"d"], False)]
    one.hurry()
    await one.close()
    await two.close()


async def test_what_is_told_of_a_purge_may_fail_and_memory_has_forgotten_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_levels, "LOOK", 0.005)
    one, two = process(tmp_path / "c.db"), process(tmp_path / "c.db")
    told: list[list[bytes]] = []

    def failing(keys: Sequence[bytes], readable: bool) -> None:
        told.append([*keys])
        raise KeyError(keys[0])

    await one.fetch(b"nothing")
    await until(lambda: one._looked)
    one.told = failing
    monkeypatch.setattr(cache_levels, "GATHER", 3600)
    watching = one._watching
    assert watching is not None
    for _ in range(2):
        one.keep(b"k", b"value", ADA)
    await two.purge()
    await until(watching.done)
    assert isinstance(watching.exception(), KeyError)
    assert told == [[b"k", b"k"]]
    assert one.recall(b"k") is None
    one.told = None
    await one.fetch(b"nothing")
    one._memory.keep(b"k", b"value", ADA, 60)
    await two.purge()
    await until(lambda: one.recall(b"k") is None)  # it looks for purges again
    one.keep(b"k", b"value", ADA)
    one.told = failing
    with pytest.raises(KeyError):
        await one.purge()
    assert one.recall(b"k") is None
    one.told = None
    one.hurry()
    await one.close()
    await two.close()


async def test_processes_that_begin_together_make_one_file(tmp_path: Path) -> None:
    for number in range(8):
        several = [process(tmp_path / f"{number}.db") for _ in range(4)]
        # Unlike `open`, this says what went wrong.
        assert await asyncio.gather(*(each.fetch(b"nothing") for each in several)) == [None] * 4
        assert [each.counts.errors for each in several] == [0] * 4
        await asyncio.gather(*(each.close() for each in several))


async def test_an_answer_that_moves_up_does_not_live_longer(tmp_path: Path) -> None:
    now = [time.time()]
    one, two = process(tmp_path / "c.db"), process(tmp_path / "c.db", clock=lambda: now[0])
    one.keep(b"k", b"value", ADA)
    await written(one, 1)
    now[0] += 59
    assert await two.fetch(b"k") is not None
    two._memory._clock = lambda: time.monotonic() + 2  # two seconds later
    assert two.recall(b"k") is None
    now[0] += 2
    assert await two.fetch(b"k") is None
    await one.close()
    await two.close()


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_a_purge_reaches_other_processes_memory(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def levels() -> CacheLevels:
        if kind == "sqlite":
            return process(tmp_path / "c.db")
        return CacheLevels(MemoryCache(MIB), RedisCache(request.getfixturevalue("redis_url")), name="redis", ttl=60)

    one, two = levels(), levels()
    await one.purge()
    assert await one.purge() == 0
    size = (await one.sizes())[kind]
    assert size is not None
    assert size.entries == 0
    one.keep(b"a", b"1", ADA)
    one.keep(b"b", b"2", BOB)
    await written(one, 2)
    await two.fetch(b"nothing")
    await until(lambda: two._mark is not None)  # it looks for purges from now on
    for key in (b"a", b"b"):
        assert await two.fetch(key) is not None
    purges = two.purges
    begun = time.monotonic()
    assert await one.purge(tenant="ada") == 1
    await until(lambda: two.recall(b"a") is None)
    assert time.monotonic() - begun < 10
    assert two.purges == purges + 1
    assert one.recall(b"a") is None
    assert await one.fetch(b"a") is None
    assert await two.fetch(b"a") is None
    assert await two.fetch(b"b") == (b"2", kind)
    assert one.recall(b"b") == b"2"
    await one.close()
    await two.close()


async def test_what_waits_to_be_written_while_another_process_purges_is_not_written(tmp_path: Path) -> None:
    one, two = process(tmp_path / "c.db"), process(tmp_path / "c.db")
    await two.fetch(b"nothing")
    await until(lambda: two._looked)
    two.keep(b"k", b"value", ADA)
    assert two._waiting
    await one.purge(tenant="ada")
    await until(lambda: two._writing is None)
    assert two.counts.writes == 0
    assert two.recall(b"k") is None
    assert await two.fetch(b"k") is None
    two.keep(b"k", b"another", ADA)
    await written(two, 1)
    await one.close()
    await two.close()


class _Slow:
    """A cache of single values that notes how many are on their way."""

    def __init__(self) -> None:
        self.under_way = self.most = 0
        self.put_there: list[bytes] = []

    async def get(self, key: bytes) -> bytes | None:
        return None

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if key == b"bad":
                raise StoreUnavailable("away")
            await asyncio.sleep(0)
            self.put_there.append(key)
        finally:
            self.under_way -= 1

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        return 0

    async def close(self) -> None: ...


async def test_single_values_go_a_few_at_a_time_and_none_arrives_after_a_failure() -> None:
    slow = _Slow()
    keys = [str(number).encode() for number in range(50)]
    await put_many(slow, [(key, b"", ADA) for key in keys], 1)
    assert sorted(slow.put_there) == sorted(keys)
    assert slow.most == AT_ONCE
    with pytest.raises(StoreUnavailable):
        await put_many(slow, [(b"bad", b"", ADA), *((key, b"", ADA) for key in keys)], 1)
    assert slow.under_way == 0


@pytest.mark.alone
async def test_redis_that_stops_is_a_miss_at_once_and_comes_back() -> None:
    with RedisServer() as server:
        levels = CacheLevels(MemoryCache(MIB), RedisCache(server.url), name="redis", ttl=60)
        levels.keep(b"k", b"value", ADA)
        await written(levels, 1)
        levels._memory.clear()
        server.stop()
        assert await levels.fetch(b"k") is None
        assert levels.counts.errors >= 1
        begun = time.monotonic()
        for _ in range(100):
            assert await levels.fetch(b"k") is None
        assert time.monotonic() - begun < 0.5
        levels.keep(b"new", b"in memory", ADA)
        assert levels.recall(b"new") == b"in memory"
        with pytest.raises(StoreUnavailable):
            await levels.purge()
        server.start()
        levels._rest_until = 0
        assert await levels.fetch(b"k") == (b"value", "redis")
        await levels.close()


@pytest.mark.alone
async def test_redis_that_hangs_is_waited_for_briefly_once() -> None:
    with RedisServer() as server:
        levels = CacheLevels(MemoryCache(MIB), RedisCache(server.url), name="redis", ttl=60)
        assert await levels.fetch(b"k") is None
        server.pause()
        begun = time.monotonic()
        for _ in range(50):
            assert await levels.fetch(b"k") is None
        assert time.monotonic() - begun < READ_TIMEOUT + 1
        assert levels.counts.errors >= 1
        server.resume()
        await levels.close()


async def test_a_broken_file_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"no database" * 1000)
    levels = process(tmp_path / "c.db")
    assert await levels.fetch(b"k") is None
    levels.keep(b"k", b"value", ADA)
    assert levels.recall(b"k") == b"value"
    assert levels.counts.errors == 1
    await levels.close()


async def test_the_configuration_chooses_the_levels(tmp_path: Path) -> None:
    store = StoreSection(data_dir=tmp_path)

    def opened(**cache: object) -> CacheLevels | None:
        return open_cache(Config(store=store, cache=CacheSection(**cache)))  # type: ignore[arg-type]

    assert opened(response_cache="off") is None
    for url, name in (
        (None, "sqlite"),
        (f"sqlite:///{tmp_path}/other.db", "sqlite"),
        ("redis://127.0.0.1:1/0", "redis"),
        ("memory://", ""),
    ):
        levels = opened(cache_url=url)
        assert levels is not None
        assert levels._name == name
        await levels.close()
    for wrong in ("mysql://x", "sqlite://", "cache.db", "sqlite:///"):
        with pytest.raises(ConfigError, match="cache_url"):
            opened(cache_url=wrong)
    several = Config(store=store, server=ServerSection(max_workers=2), cache=CacheSection(cache_url="memory://"))
    with pytest.raises(ConfigError, match="share"):
        open_cache(several)
    sealed = opened(cache_encryption_key="a long enough secret")
    assert sealed is not None
    sealed.keep(b"k", b"a private answer", ADA)
    await written(sealed, 1)
    await sealed.close()
    assert (tmp_path / "cache.db").stat().st_mode & 0o777 == 0o600
    assert b"private" not in b"".join(file.read_bytes() for file in tmp_path.glob("cache.db*"))
