"""Refuses callers that are certainly over their limit, before any work on what they sent. Takes nothing and asks nobody."""

from __future__ import annotations

from headrace.policies.claimants import Claimants
from headrace.policies.rate_answers import limit_headers, refusal, show_limits
from headrace.ports import Limits
from headrace.types import Call, Caller
from headrace.unwinding import before


class LimitRequests:
    """Raises `RateLimited`. What it lets through is decided in `reserve`, in one operation over all limits."""

    def __init__(self, claimants: Claimants, limits: Limits) -> None:
        self._claimants = claimants
        self._limits = limits

    @before
    async def __call__(self, call: Call) -> None:
        claims = self._claimants.claims(call)
        if claims:
            refused, rooms = self._limits.peek(claims)
            show_limits(call, claims, rooms)
            if refused is not None:
                raise refusal(claims, refused)


class ShowLimits:
    """The `x-ratelimit-*` headers of answers to requests of which no call was made, such as bodies that can't be read."""

    def __init__(self, claimants: Claimants, limits: Limits) -> None:
        self._claimants = claimants
        self._limits = limits

    def __call__(self, caller: Caller, address: str) -> dict[str, str]:
        claims = self._claimants.claims_of(caller, address)
        return limit_headers(claims, self._limits.peek(claims)[1]) if claims else {}
