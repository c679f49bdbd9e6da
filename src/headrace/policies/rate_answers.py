"""What callers are told of their limits: OpenAI's headers on every answer, and refusals that say what to do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from headrace.claims import Claim, Refused, Room, period_end
from headrace.errors import RateLimited

SOON = 1.0
"""Seconds; when a running request ends can't be known."""
LATER = 3600.0
"""Seconds; only an operator can change that it is refused."""


class ShowsLimits(Protocol):
    """A call, or a request of which no call was made yet."""

    late_headers: Callable[[], dict[str, str]] | None


def show_limits(asking: ShowsLimits, claims: Sequence[Claim], rooms: Sequence[Room]) -> None:
    """Set its `x-ratelimit-*` headers. They are worked out when they are sent: what is known is said several times on the way."""
    asking.late_headers = partial(limit_headers, claims, rooms)


def limit_headers(claims: Sequence[Claim], rooms: Sequence[Room]) -> dict[str, str]:
    """Each by the claim that has least left. Where no rate limits tokens, a budget does."""
    requests: _Shown | None = None
    tokens: _Shown | None = None
    for claim, room in zip(claims, rooms, strict=True):
        if claim.requests is not None:
            requests = _least(requests, (_whole(room.requests), claim.requests, _refill(claim.requests, room.requests, claim.window)))
        if claim.tokens is not None:
            tokens = _least(tokens, (_whole(room.tokens), claim.tokens, _refill(claim.tokens, room.tokens, claim.window)))
    if tokens is None:
        now = time.time()
        for claim, room in zip(claims, rooms, strict=True):
            if claim.budget is not None:
                end = period_end(claim.period, now)
                left = max(0, claim.budget - room.spent - room.held)
                tokens = _least(tokens, (left, claim.budget, None if end is None else end - now))
    headers: dict[str, str] = {}
    for name, found in (("requests", requests), ("tokens", tokens)):
        if found is not None:
            left, limit, reset = found
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            if reset is not None:
                headers[f"x-ratelimit-reset-{name}"] = duration(reset)
    return headers


_Shown = tuple[int, int, float | None]


def _least(one: _Shown | None, other: _Shown) -> _Shown:
    return other if one is None or other[0] < one[0] else one


def _whole(level: float) -> int:
    # What has refilled to within a rounding error of a whole is one.
    return max(0, math.floor(level + 1e-6))


def _refill(size: int, level: float, window: float) -> float:
    """Seconds until it is full."""
    return max(0.0, size - level) * window / size if size else 0.0


def duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `23h59m59s`."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    if seconds < 60:
        return f"{math.ceil(10 * seconds) / 10:g}s"
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + f"{minutes}m{whole % 60}s"


def refusal(claims: Sequence[Claim], refused: Refused, *, prompt: int = 0) -> RateLimited:
    """The error for a caller. `retry_after` is when the same request could be admitted, where that can be known."""
    error = _refusal(claims, refused, prompt)
    error.limit = refused.dimension, claims[refused.which].subject.partition(":")[0]
    return error


def _refusal(claims: Sequence[Claim], refused: Refused, prompt: int) -> RateLimited:
    claim = claims[refused.which]
    whose = {"key": "this key", "tenant": "this key's tenant", "address": "callers without a key"}[claim.subject.partition(":")[0]]
    if refused.dimension == "requests":
        assert claim.requests is not None
        message = f"The limit of {whose} is {_times(claim.requests, 'request')} in {_window(claim.window)}."
        return RateLimited(message, retry_after=LATER if refused.wait is None else refused.wait)
    if refused.dimension == "concurrency":
        return RateLimited(f"The limit of {whose} is {_times(claim.concurrency or 0, 'request')} at a time.", retry_after=SOON)
    if refused.dimension == "tokens":
        message = f"The limit of {whose} is {_times(claim.tokens or 0, 'token')} in {_window(claim.window)}"
        if refused.wait is None:
            return RateLimited(f"{message}, and this prompt alone has {prompt}. Shorten it.", retry_after=LATER)
        return RateLimited(f"{message}.", retry_after=SOON if refused.passing else refused.wait)
    assert claim.budget is not None
    now = time.time()
    end = period_end(claim.period, now)
    of = {"day": " a day", "month": " a month", "total": ""}[claim.period]
    room = refused.rooms[refused.which]
    left = max(0, claim.budget - room.spent - room.held)
    message = f"The budget of {whose} is {_times(claim.budget, 'token')}{of}; {left} are left, and this prompt alone has {prompt}."
    if prompt >= claim.budget:
        return RateLimited(f"{message} Shorten it.", retry_after=LATER)
    return RateLimited(message, retry_after=SOON if refused.passing else LATER if end is None else end - now)


def _times(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _window(seconds: float) -> str:
    return {1.0: "a second", 60.0: "a minute", 3600.0: "an hour", 86400.0: "a day"}.get(seconds, f"{seconds:g} s")
