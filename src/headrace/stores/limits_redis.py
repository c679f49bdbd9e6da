"""Limits in Redis or Valkey: one script, one round trip, the server's clock."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.claims import LAPSED_SECONDS, LEASE_SECONDS, Ask, Reply
from headrace.errors import ConfigError, StoreUnavailable

TIMEOUT = 0.05
"""Seconds that a request waits for the answer, before limits are kept apart."""
CONNECT_TIMEOUT = 1.0
_AWAY = "What keeps this server's limits can't be used now."
PREFIX = "{headrace}"
"""A hash tag: all keys are in one slot, because a take spans several subjects."""

_replies = msgspec.json.Decoder(tuple[int, list[Reply]])
_encode = msgspec.json.Encoder().encode


class RedisLimits:
    """`shared_limits.LimitPlace` over one connection. Raises `ConfigError` for a URL that can't be one, or without the driver."""

    def __init__(self, url: str, *, timeout: float = TIMEOUT) -> None:
        try:
            from redis import exceptions
            from redis.asyncio import ConnectionPool
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as error:
            raise ConfigError("limits_url names Redis, and its driver is not installed: pip install 'headrace[redis]'.") from error
        try:
            pool = ConnectionPool.from_url(url, socket_connect_timeout=CONNECT_TIMEOUT, retry=Retry(NoBackoff(), 0))
        except ValueError as error:
            raise ConfigError(f"limits_url is not the URL of a Redis server, such as redis://HOST:6379/0: {error}.") from error
        self._connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
        self._timeout = timeout
        self._script = Path(__file__).with_name("limits.lua").read_bytes()
        self._hash = hashlib.sha1(self._script, usedforsecurity=False).hexdigest()
        self._errors = (exceptions.RedisError, OSError, TimeoutError)
        self._not_allowed = exceptions.NoPermissionError
        self._ready = False
        self._turn = 0
        """How many times the script had run when it last answered: a Redis that has run it less often has forgotten something."""
        self._run = self._turn_of = ""
        """The run of Redis that is connected, and that in which it last answered."""

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        return await self._exchange(asks, self._timeout)

    async def tell(self, asks: Sequence[Ask]) -> None:
        await self._exchange(asks, max(self._timeout, CONNECT_TIMEOUT))

    async def _exchange(self, asks: Sequence[Ask], timeout: float) -> list[Reply]:
        if not self._ready:
            await self.reconnect()
        try:
            async with asyncio.timeout(timeout):
                said = _encode(asks)
                known = self._turn, self._run, self._turn_of
                await self._connection.send_command("EVALSHA", self._hash, 1, PREFIX, said, LEASE_SECONDS, int(LAPSED_SECONDS), *known)
                self._turn, replies = _replies.decode(await self._connection.read_response())
                self._turn_of = self._run
                return replies
        except self._errors as error:
            # An answer that comes late would be taken for the next one's.
            await self._drop()
            message = f"Redis, which keeps the limits, can't be used: {_named(error)}"
            raise StoreUnavailable(message, told=_AWAY, retry_after=1) from error
        except BaseException:
            await self._drop()
            raise

    async def reconnect(self) -> None:
        try:
            await self._drop()
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self._connection.connect()
                await self._connection.send_command("SCRIPT", "LOAD", self._script)
                await self._connection.read_response()
                await self._connection.send_command("INFO", "server")
                try:
                    self._run = _run_of(await self._connection.read_response())
                except self._not_allowed:
                    # INFO is one of the "dangerous" commands; without it the turn alone tells what was forgotten.
                    self._run = ""
            self._ready = True
        except self._errors as error:
            await self._drop()
            message = f"Redis, which keeps the limits, can't be reached: {_named(error)}"
            raise StoreUnavailable(message, told=_AWAY, retry_after=1) from error

    async def close(self) -> None:
        await self._drop()

    async def _drop(self) -> None:
        self._ready = False
        with contextlib.suppress(*self._errors):
            await self._connection.disconnect(nowait=True)


def _run_of(info: bytes | str) -> str:
    """Random, another one with each start of Redis."""
    text = info.decode() if isinstance(info, bytes) else info
    return next((line.removeprefix("run_id:").strip() for line in text.splitlines() if line.startswith("run_id:")), "")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
