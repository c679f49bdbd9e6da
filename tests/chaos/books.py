"""What databases and Redis say when all is over, read past the server and past the gates."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import Any

_COLUMNS = "id, key, status, prompt_tokens, completion_tokens, settled_at"


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    key: str
    status: str
    prompt: int
    completion: int
    settled_at: float | None


def rows(url: str) -> list[Row]:
    """All of the ledger, of `sqlite:///FILE` or of PostgreSQL."""
    question = f"SELECT {_COLUMNS} FROM usage"
    if url.startswith("sqlite:///"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10)) as database:
            return [Row(*row) for row in database.execute(question)]
    return [Row(*row) for row in asyncio.run(_postgres(url, question))]


async def _postgres(url: str, question: str) -> list[Any]:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(question)]
    finally:
        await connection.close()


@dataclass(frozen=True, slots=True)
class Standing:
    """Of a key's limits in Redis: tokens spent and leased, requests running."""

    spent: int
    held: int
    loose: int
    running: tuple[str, ...] = ()
    """Their ids."""


def standing(url: str, key: str) -> Standing | None:
    """None where Redis knows nothing of the key."""
    import redis

    with redis.Redis.from_url(url) as connection:
        life: Any = connection.hget("{headrace}:t", "e")
        prefix = "{headrace}" + ("" if life is None else life.decode())
        found: Any = connection.hmget(f"{prefix}:s:key:{key}", "u", "h", "o")
        if found[0] is None:
            return None
        running: Any = connection.zrange(f"{prefix}:r:key:{key}", 0, -1)
        return Standing(int(found[0]), int(found[1]), int(found[2]), tuple(id.decode() for id in running))
