"""Refuses callers that are certainly over their limit of requests, before anything they sent is read; and counts what they sent in vain."""

from __future__ import annotations

from typing import Protocol

from headrace.claims import Claim
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
        """Count so many requests that come to nothing, once for each that asks. They take no place of requests that run."""
        claims = self._claims(asking)
        if times and any(claim.requests is not None for claim in claims):
            rooms = await self._limits.charge(f"{asking.id}:vain", claims, times)
            if rooms is not None:
                show_limits(asking, claims, rooms)

    def _claims(self, asking: Limited) -> tuple[Claim, ...]:
        return self._claimants.claims_of(asking.caller, asking.address) if asking.caller is not None else ()
