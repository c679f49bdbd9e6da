"""Answers that have expired, kept for the time when nobody can give a new one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.config import Config, ResilienceSection, StoreSection
from headrace.records import CacheTags
from headrace.stores.cache_levels import CacheLevels
from headrace.stores.cache_memory import MemoryCache
from headrace.stores.cache_open import open_cache
from headrace.stores.cache_sqlite import SqliteCache

pytestmark = pytest.mark.anyio

MIB = 1048576
ADA = CacheTags("ada", "m", "key_1")


async def test_memory_keeps_what_has_expired_for_a_while() -> None:
    now = [0.0]
    levels = CacheLevels(MemoryCache(MIB, grace=100, clock=lambda: now[0]), ttl=10, grace=100)
    levels.keep(b"k", b"answer", ADA)
    assert levels.recall(b"k") == b"answer"
    now[0] = 11
    assert levels.recall(b"k") is None
    assert await levels.fetch(b"k") is None
    assert await levels.old(b"k") == (b"answer", "memory")
    now[0] = 111
    assert await levels.old(b"k") is None


async def test_so_does_the_second_level_and_purges_reach_both(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "cache.db"
    levels = CacheLevels(MemoryCache(MIB), SqliteCache(path, MIB), name="sqlite", ttl=10, grace=100, clock=lambda: now[0])
    levels.keep(b"k", b"answer", ADA)
    async with asyncio.timeout(20):
        while not levels.counts.writes:
            await asyncio.sleep(0.005)
    now[0] += 50
    other = CacheLevels(MemoryCache(MIB), SqliteCache(path, MIB), name="sqlite", ttl=10, grace=100, clock=lambda: now[0])
    assert await other.fetch(b"k") is None
    assert other.recall(b"k") is None
    assert await other.old(b"k") == (b"answer", "sqlite")
    await levels.purge(tenant="ada")
    assert await other.old(b"k") is None
    await levels.close()
    await other.close()


async def test_nothing_is_kept_longer_where_no_fallback_wants_it(tmp_path: Path) -> None:
    store = StoreSection(data_dir=tmp_path)
    plain = open_cache(Config(store=store))
    wanted = open_cache(Config(store=store, resilience=ResilienceSection(fallbacks={"m": ("cache",)}, fallback_cache_age=7)))
    assert plain is not None
    assert wanted is not None
    assert (plain._grace, wanted._grace) == (0.0, 7.0)
    await plain.close()
    await wanted.close()
