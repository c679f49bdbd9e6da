"""Many values into a cache: in one go where it can do that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from headrace.ports import Cache, PutsMany
from headrace.records import CacheTags

AT_ONCE = 4
"""Values on their way where each is put alone: requests want connections, too."""


async def put_many(cache: Cache, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
    """Values with their keys and tags. Raises `StoreUnavailable`; it isn't known then which of them are there."""
    if isinstance(cache, PutsMany):
        await cache.put_many(values, ttl)
        return
    left = iter(values)

    async def put() -> None:
        for key, value, tags in left:
            await cache.put(key, value, tags, ttl)

    # Nothing may arrive once this has returned or raised, because a purge may come next.
    ends = await asyncio.gather(*(put() for _ in range(AT_ONCE)), return_exceptions=True)
    for raised in ends:
        if raised is not None:
            raise raised
