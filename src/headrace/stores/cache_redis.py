"""The cache in Redis (or Valkey), which the API processes of several machines share.

Each value is a string with a lifetime. For purges each tag has a sorted set of its values' keys, by the time they expire; what has expired
leaves the sets with the next put. How large all may grow is for the Redis server to say (`maxmemory`, with an eviction policy such as
`allkeys-lru`): keys of sets that were evicted are found no more by a purge, but everything still goes with its lifetime.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError, StoreUnavailable
from headrace.records import CacheSize, CacheTags

if TYPE_CHECKING:
    from redis.asyncio import Redis

TIMEOUT = 1.0
"""Seconds for a connection, and for an answer."""
CONNECTIONS = 16
TURN = 10.0
"""Seconds to wait for one of them: a crowd is not a Redis that is away. Requests have a shorter limit of their own (`cache_levels`)."""
PREFIX = "headrace:cache:"
_CHUNK = 500
_ALL = PREFIX + "all"


class RedisCache:
    """`ports.Cache` behind `redis://…` or `rediss://…`. Nothing is connected before the first use.

    Raises `ConfigError` for a URL that can't be one, or if the extra `redis` isn't installed.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
        except ModuleNotFoundError as error:
            raise ConfigError("cache_url: the driver for Redis is not installed: pip install 'headrace[redis]'.") from error
        try:
            pool = BlockingConnectionPool.from_url(
                url, max_connections=CONNECTIONS, timeout=TURN, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT
            )
        except ValueError as error:
            raise ConfigError(f"cache_url: {error}") from error
        self._redis: Redis = Redis.from_pool(pool)
        self._clock = clock

    async def get(self, key: bytes) -> bytes | None:
        found: bytes | None = await self._tell(self._redis.get(_value(key)))
        return found

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        now = self._clock()
        lifetime = max(1, int(ttl * 1000))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(_value(key), value, px=lifetime)
            for name in (_ALL, *_tags(tags.tenant, tags.model, tags.key or None)):
                pipe.zremrangebyscore(name, "-inf", now)
                pipe.zadd(name, {key: now + ttl})
                pipe.pexpire(name, lifetime + 60_000)
            await self._tell(pipe.execute())

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        names = _tags(tenant, model, key) or [_ALL]
        members: list[bytes] = await self._tell(self._redis.zrange(names[0], 0, -1) if len(names) == 1 else self._redis.zinter(names))
        dropped = 0
        for begin in range(0, len(members), _CHUNK):
            chunk = members[begin : begin + _CHUNK]
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.unlink(*map(_value, chunk))
                for name in {*names, _ALL}:
                    pipe.zrem(name, *chunk)
                answers: list[int] = await self._tell(pipe.execute())
            dropped += answers[0]
        return dropped

    async def size(self) -> CacheSize:
        return CacheSize(await self._tell(self._redis.zcount(_ALL, self._clock(), "+inf")), None)

    async def close(self) -> None:
        from redis.exceptions import RedisError

        try:
            await self._redis.aclose()
        except (RedisError, OSError):
            return

    async def _tell(self, command: Any) -> Any:
        from redis.exceptions import RedisError

        try:
            return await command
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"The cache in Redis can't be used: {error}", told="The server's cache can't be used now.") from error


def _value(key: bytes) -> bytes:
    return PREFIX.encode() + b"value:" + key.hex().encode()


def _tags(tenant: str | None, model: str | None, key: str | None) -> list[str]:
    named = {"tenant": tenant, "model": model, "key": key}
    return [f"{PREFIX}{kind}:{name}" for kind, name in named.items() if name is not None]
