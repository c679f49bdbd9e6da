"""Refuses callers that are certainly over their limit of requests, before anything they sent is read; and counts what they sent in vain."""

from __future__ import annotations

import asyncio
from typing import Protocol

from headrace.claims import Claim, Room, Take, Taken
from headrace.errors import StoreUnavailable
from headrace.policies.claimants import Claimants
from headrace.policies.rate_answers import ShowsLimits, refusal, show_limits
from headrace.ports import Limits
from headrace.records import Caller


class Limited(ShowsLimits, Protocol):
    """A request as it is known before it is read."""

    id: str
    caller: Caller | None
    address: str


class LimitRequests:
    """A request that is good is counted in `reserve`, in one operation over all limits; one that isn't, by `count`."""

    def __init__(self, claimants: Claimants, limits: Limits) -> None:
        self._claimants = claimants
        self._limits = limits

    def look(self, asking: Limited, *, refuse: bool) -> None:
        """Show how the caller stands, by what this process knows: nothing is taken, and nobody asked.

        Raises `RateLimited`, if it is to `refuse`, where the bucket of requests is certainly empty.
        """
        claims = self._claims(asking)
        if claims:
            refused, rooms = self._limits.peek(claims)
            show_limits(asking, claims, rooms)
            if refuse and refused is not None:
                raise refusal(claims, refused)

    async def count(self, asking: Limited, times: int) -> None:
        """Count so many requests that come to nothing; what a limit doesn't allow is left out."""
        claims = self._claims(asking)
        if claims and times:
            counted = await asyncio.gather(*(self._take(f"{asking.id}:vain-{number}", claims) for number in range(times)))
            if rooms := counted[-1]:
                show_limits(asking, claims, rooms)

    async def _take(self, id: str, claims: tuple[Claim, ...]) -> tuple[Room, ...]:
        try:
            reply = await self._limits.take(Take(id, claims, 0, 0, 0))
        except StoreUnavailable:
            return ()  # the caller is told of its own mistake
        if isinstance(reply, Taken):
            await self._limits.settle(id, 0, wait=False)
        return reply.rooms

    def _claims(self, asking: Limited) -> tuple[Claim, ...]:
        return self._claimants.claims_of(asking.caller, asking.address) if asking.caller is not None else ()
