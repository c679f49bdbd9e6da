"""Many values into a cache: in one go where it can do that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from headrace.ports import Cache, PutsMany
from headrace.types import CacheTags


async def put_many(cache: Cache, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
    """Values with their keys and tags. Raises `StoreUnavailable`; it isn't known then which of them are there."""
    if isinstance(cache, PutsMany):
        await cache.put_many(values, ttl)
    else:
        await asyncio.gather(*(cache.put(key, value, tags, ttl) for key, value, tags in values))
