"""The circuit breaker: an engine that fails too often is left alone for a while, and tried with a few requests before all may come.

The state machine of one engine, for one place that all processes report to (`headrace.circuits`). Nothing here knows the time: every
method is told it, in seconds of a monotonic clock.

    closed ──(failure share over the window)──▶ open ──(open_seconds)──▶ half-open ──(all probes succeed)──▶ closed
                                                  ◀──────(a probe fails)──────┘
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

from headrace.config import ResilienceSection
from headrace.types import CircuitState


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When it opens, and how it closes again. Times in seconds."""

    window: float = 30.0
    failure_share: float = 0.5
    min_calls: int = 10
    open_seconds: float = 10.0
    probes: int = 3

    @classmethod
    def of(cls, section: ResilienceSection) -> BreakerRules:
        return cls(
            section.breaker_window,
            section.breaker_failure_share,
            section.breaker_min_calls,
            section.breaker_open_seconds,
            section.breaker_probes,
        )


@dataclass(slots=True)
class Breaker:
    rules: BreakerRules
    state: CircuitState = "closed"
    epoch: int = 0
    """Grows with every change of state. What began in another epoch says nothing about this one, and isn't counted."""
    opened_at: float = 0.0
    _window: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(when, calls, failures), oldest first."""
    _calls: int = 0
    _failures: int = 0
    _probes: dict[int, object] = field(default_factory=dict)
    """Those under way, with who has them."""
    _passed: int = 0
    """Probes that succeeded in this epoch."""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def note(self, epoch: int, calls: int, failures: int, now: float) -> None:
        """Count calls that are over; `failures` of them failed or were slow."""
        self.advance(now)
        if epoch != self.epoch or self.state != "closed" or calls <= 0:
            return
        self._window.append((now, calls, failures))
        self._calls += calls
        self._failures += failures
        self._forget(now)
        if failures and self._calls >= self.rules.min_calls and self._failures >= self.rules.failure_share * self._calls:
            self._open(now)

    def probe(self, holder: object, now: float) -> int | None:
        """Leave to try the engine, as a number that `probed` wants back; None where there is none to be had."""
        self.advance(now)
        if self.state != "half_open" or self._passed + len(self._probes) >= self.rules.probes:
            return None
        number = next(self._numbers)
        self._probes[number] = holder
        return number

    def probed(self, number: int, succeeded: bool | None, now: float) -> None:
        """What a probe found; None: nothing, somebody else may try. Numbers of another epoch are ignored."""
        if number not in self._probes:
            return
        del self._probes[number]
        if succeeded is None:
            return
        if not succeeded:
            self._open(now)
            return
        self._passed += 1
        if self._passed >= self.rules.probes:
            self._become("closed")

    def lapse(self, holder: object) -> None:
        """Who held these probes is gone, and what they found with him."""
        self._probes = {number: each for number, each in self._probes.items() if each != holder}

    def advance(self, now: float) -> None:
        """Let time pass."""
        if self.state == "open" and now >= self.opened_at + self.rules.open_seconds:
            self._become("half_open")

    def wait(self, now: float) -> float:
        """Seconds until `advance` changes something; 0 where only calls do."""
        return max(0.0, self.opened_at + self.rules.open_seconds - now) if self.state == "open" else 0.0

    def _open(self, now: float) -> None:
        self.opened_at = now
        self._become("open")

    def _become(self, state: CircuitState) -> None:
        self.state = state
        self.epoch += 1
        self._window.clear()
        self._calls = self._failures = self._passed = 0
        self._probes = {}

    def _forget(self, now: float) -> None:
        window = self._window
        while window and window[0][0] <= now - self.rules.window:
            _, calls, failures = window.popleft()
            self._calls -= calls
            self._failures -= failures
