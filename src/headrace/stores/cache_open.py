"""The response cache that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from headrace.config import Config
from headrace.errors import ConfigError
from headrace.ports import Cache
from headrace.stores.cache_levels import CacheLevels
from headrace.stores.cache_memory import MemoryCache
from headrace.stores.cache_redis import RedisCache
from headrace.stores.cache_sealed import SealedCache

MIB = 1048576


def open_cache(config: Config) -> CacheLevels | None:
    """The levels, none of them connected yet; None where the cache is off.

    Raises `ConfigError` for a URL that is no cache's, and for several API processes without a level that they share.
    """
    section = config.cache
    if section.response_cache == "off":
        return None
    name, second = second_level(config)
    if second is not None and section.cache_encryption_key is not None:
        second = SealedCache(second, section.cache_encryption_key.get_secret_value())
    resilience = config.resilience
    grace = resilience.fallback_cache_age if any("cache" in chain for chain in resilience.fallbacks.values()) else 0.0
    return CacheLevels(MemoryCache(int(section.cache_memory_mib * MIB), grace=grace), second, name=name, ttl=section.cache_ttl, grace=grace)


def second_level(config: Config) -> tuple[str, Cache | None]:
    """The level behind memory, with its name for headers and figures."""
    url = config.cache.cache_url
    scheme, _, rest = (url or "").partition("://")
    if url is None or scheme == "sqlite":
        # SQLAlchemy takes long to import; Redis and memory go without it.
        from headrace.stores.cache_sqlite import SqliteCache

        if url is not None and len(rest) < 2:
            raise ConfigError("cache_url: SQLite needs a file, which all processes share: sqlite:////var/cache/headrace/cache.db.")
        path = config.store.data_dir / "cache.db" if url is None else Path(rest[1:])
        return "sqlite", SqliteCache(path.expanduser().absolute(), int(config.cache.cache_disk_mib * MIB))
    if scheme in ("redis", "rediss", "valkey", "valkeys"):
        return "redis", RedisCache(f"{scheme.replace('valkey', 'redis')}://{rest}")
    if scheme == "memory":
        if config.server.max_workers > 1:
            raise ConfigError(
                "cache_url: with several API processes the cache needs a level that they share: sqlite:///FILE or redis://HOST."
            )
        return "", None
    raise ConfigError(f"cache_url: {scheme or url!r} is not a cache that we know; there is sqlite, redis and memory.")
