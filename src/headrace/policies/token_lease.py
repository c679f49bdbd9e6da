"""The output tokens that a running request may use: leased a piece at a time, ahead of need, and ended where a budget ends."""

from __future__ import annotations

import math
import time

import msgspec

from headrace.call import Call
from headrace.claims import Extended
from headrace.ports import Limits
from headrace.types import Delta, Event

LEASE = 64
"""Tokens of output that are leased at a time, for each choice."""
LONGEST_LEASE = 1024
"""Where the engine is faster than further leases come, they grow up to this."""
STEPS_BEHIND = 2
"""Tokens of each choice that an engine may make between our decision to stop it and its stopping."""
ASK_AGAIN = 0.1
"""Seconds between asks while the rest of a budget is in the hands of other requests."""

NOTE = "X-Headrace-Limit"
BUDGET_ENDED = "budget"


class TokenLease:
    """A transform of one call's events. `total`: most tokens of output that the engine was asked for, over all choices.

    Without a `budget` a lease only keeps the rate's count up to date; with one, nothing goes on beyond what was granted. Where the
    engine's own maximum is within what was granted, the engine itself ends there; else the call is ended here, early enough for the
    engine to stop within the lease.
    """

    __slots__ = (
        "_asked_at",
        "_asking",
        "_budget",
        "_call",
        "_capped",
        "_choices",
        "_limits",
        "_next_ask",
        "_piece",
        "_total",
        "granted",
        "used",
    )

    def __init__(self, call: Call, limits: Limits, *, granted: int, total: int, budget: bool, capped: bool) -> None:
        n = call.sampling.n
        self._call = call
        self._limits = limits
        self._choices = set(range(n))
        """Those that haven't ended."""
        self._piece = LEASE * n
        self._total = total
        self._budget = budget
        self._capped = capped
        """The engine's maximum is what a budget has left, less than was asked for."""
        self._asking = False
        self._asked_at = 0.0
        self.granted = granted
        self.used = 0
        self._next_ask = self._due()

    def __call__(self, batch: list[Event]) -> list[Event]:
        for event in batch:
            if type(event) is Delta:
                self.used += len(event.tokens)
                if event.finish is not None:
                    self._choices.discard(event.choice)
                    if self._capped and event.finish == "length":
                        self._say_why()
        if self.used < self._next_ask or not self._choices:
            return batch
        return self._near_the_end(batch)

    def most_used(self) -> int:
        """Tokens of output that the engine may have made, now that it was stopped: those that came, and those on their way."""
        return max(self.used, min(self._total, self.used + STEPS_BEHIND * len(self._choices)))

    def _due(self) -> float:
        """When to come to `_near_the_end`: with half a lease in hand, or never if all is granted."""
        return math.inf if self.granted >= self._total else self.granted - self._piece / 2

    def _near_the_end(self, batch: list[Event]) -> list[Event]:
        if self._asking:
            if self.used >= self.granted:
                self._piece = min(2 * self._piece, LONGEST_LEASE * self._call.sampling.n)
            return batch
        now = time.monotonic()
        if self._budget and self.used >= self.granted - STEPS_BEHIND * len(self._choices) and self._asked_at:
            return self._ended(batch)
        if now - self._asked_at >= ASK_AGAIN:
            self._asking = True
            self._asked_at = now
            behind = max(0, self.used - self.granted)
            self._limits.extend(self._call.id, min(behind + self._piece, self._total - self.granted), self._told)
        return batch

    def _told(self, extended: Extended) -> None:
        self._asking = False
        self.granted += extended.granted
        if extended.granted:
            # The next ask needn't wait, unless this one brought less than a lease.
            self._asked_at = 0.0 if not extended.passing else self._asked_at
        elif not extended.passing:
            self._asked_at = math.inf
        self._next_ask = self._due()

    def _ended(self, batch: list[Event]) -> list[Event]:
        """End every choice with this batch. The journey closes the source."""
        out: list[Event] = []
        for event in reversed(batch):
            if isinstance(event, Delta) and event.choice in self._choices:
                self._choices.discard(event.choice)
                event = msgspec.structs.replace(event, finish="length")
            out.append(event)
        out.reverse()
        out += [Delta(choice, 0, (), "", "length") for choice in sorted(self._choices)]
        self._call.ended = True
        self._say_why()
        return out

    def _say_why(self) -> None:
        self._call.notes[NOTE] = BUDGET_ENDED
        self._call.storable = False
