"""One engine's circuit breaker as an API process knows it: what the place that counts for all processes has told it, and what it tells."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from headrace.errors import CircuitOpen
from headrace.types import CircuitState

FLUSH = 0.05
"""Seconds that outcomes are gathered before they are reported."""
ONE_DEATH = 1.0
"""A death ends many requests in the same moment; within so many seconds it is counted as one failure."""


class CircuitPlace(Protocol):
    """Where the breakers are: the supervisor, as a rule."""

    def report(self, model: str, epoch: int, calls: int, failures: int) -> None:
        """Calls that are over, and how many of them failed."""
        ...

    async def probe(self, model: str) -> int | None:
        """Ask for leave to try an engine whose breaker is half-open; a number for `probed`, or None."""
        ...

    def probed(self, model: str, number: int, succeeded: bool | None) -> None:
        """What the probe found; None: nothing."""
        ...


class Circuit:
    """`name` is what callers know the model by."""

    def __init__(self, model: str, name: str, place: CircuitPlace) -> None:
        self.state: CircuitState = "closed"
        self.epoch = 0
        self._model = model
        self._name = name
        self._place = place
        self._until = 0.0
        self._calls = 0
        self._failures = 0
        self._flushing: asyncio.TimerHandle | None = None
        self._last_death = -ONE_DEATH

    @property
    def closed(self) -> bool:
        return self.state == "closed"

    def changed(self, state: CircuitState, epoch: int, wait: float) -> None:
        """The place says how it stands. `wait`: seconds until probes are let through, if it is open."""
        if epoch != self.epoch:
            # Of another time; the place wouldn't count it any more.
            self._calls = self._failures = 0
        self.state, self.epoch, self._until = state, epoch, time.monotonic() + wait

    async def admit(self) -> int:
        """Leave to ask the engine, in any state: 0, or the number of a probe, whose end `probed` is to be told. Raises `CircuitOpen`."""
        if self.closed:
            return 0
        number = await self._place.probe(self._model) if self.state == "half_open" else None
        if number is not None:
            return number
        if self.closed:  # it was closed while we asked
            return 0
        raise self.refusal()

    def refusal(self) -> CircuitOpen:
        if self.state == "open":
            why, wait = "It is left alone for a while", self._until - time.monotonic()
        else:
            why, wait = "A few requests are trying it now", 0.0
        return CircuitOpen(f"The engine of {self._name!r} failed too often just now. {why}.", retry_after=max(1.0, wait))

    def probed(self, number: int, succeeded: bool | None) -> None:
        self._place.probed(self._model, number, succeeded)

    def note(self, epoch: int, *, failed: bool, death: bool = False) -> None:
        """A call that was admitted in that epoch is over."""
        if epoch != self.epoch or self.state != "closed":
            return
        if death:
            now = time.monotonic()
            if now - self._last_death < ONE_DEATH:
                return
            self._last_death = now
        self._calls += 1
        self._failures += failed
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(FLUSH, self._flush)

    def _flush(self) -> None:
        self._flushing = None
        calls, failures = self._calls, self._failures
        self._calls = self._failures = 0
        if calls:
            self._place.report(self._model, self.epoch, calls, failures)
