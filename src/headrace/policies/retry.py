"""Asking an engine again that failed before its first token: how often, when, and for which failures.

The pause is drawn from the whole of an interval that doubles («full jitter»: Brooker, «Exponential Backoff and Jitter», 2015), so that
requests that failed together don't come back together. The budget keeps retries from becoming the load that an engine breaks under.
"""

from __future__ import annotations

import random

from headrace.errors import CircuitOpen, EngineDied, HeadraceError, NotAdmitted, QueueShareFull

FIRST_PAUSE = 0.1
"""Seconds; the longest that the first retry waits."""
LONGEST_PAUSE = 2.0
SAVED = 100.0
"""Most retries that requests without failures can save up."""


class RetryBudget:
    """At most `share` of the requests, and `reserve` on top, may be asked again."""

    def __init__(self, share: float, reserve: int) -> None:
        self._share = share
        self._saved = float(reserve)
        self._most = max(SAVED, reserve)

    def earn(self) -> None:
        """A request was made."""
        self._saved = min(self._most, self._saved + self._share)

    def spend(self) -> bool:
        """Take leave for a retry, if there is one. The share is added up in binary fractions: a millionth is forgiven."""
        if self._saved < 1 - 1e-6:
            return False
        self._saved -= 1
        return True


def may_help(error: HeadraceError) -> bool:
    """Whether the same request may succeed a moment later.

    The engine's client has submitted a request again already where it ends with `EngineDied`, an open circuit stays open for longer, and a
    full queue is best left alone.
    """
    return error.retry and not isinstance(error, EngineDied | CircuitOpen | NotAdmitted | QueueShareFull)


def pause(retry: int, retry_after: float | None, draw: random.Random) -> float | None:
    """Seconds to wait before retry number `retry`, from 0; None where the engine wants to be left alone for longer than we wait."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**retry)
    jittered = draw.uniform(0.0, longest)
    if retry_after is None:
        return jittered
    return retry_after + jittered if retry_after <= LONGEST_PAUSE else None
