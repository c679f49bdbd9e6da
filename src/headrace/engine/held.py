"""Requests that are held back before the engine, until their turn comes: those that wait in the line of the patient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from headrace.engine.admission import Admission, Entry
from headrace.engine.fair_line import FairLine

MOST_LOOKS = 8
"""Tenants that are looked at, at a time, for one that may go."""


class Held:
    """One request: `start` hands it to the engine and gives what cancels it there, `over` says that nothing more comes of it."""

    def __init__(self, entry: Entry, start: Callable[[], Callable[[], None]], over: Callable[[], None]) -> None:
        self.entry = entry
        self.line: HeldBack | None = None
        """Where it waits; None before and after."""
        self._start = start
        self._over = over
        self._cancel: Callable[[], None] | None = None

    def release(self) -> None:
        """Its turn has come."""
        self._cancel = self._start()

    def cancel(self) -> None:
        """Wherever it is. Idempotent."""
        if self._cancel is not None:
            self._cancel()
        elif self.line is not None:
            self.line.discard(self)
            self._over()


class HeldBack:
    """All of them: the higher priority first, and among equals the tenants take turns."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._line = FairLine[Held]()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, held: Held) -> None:
        held.line = self
        tenant, rank = held.entry.line
        self._line.add(held, rank=rank, tenant=tenant)

    def discard(self, held: Held) -> None:
        """It goes nowhere any more."""
        held.line = None
        tenant, rank = held.entry.line
        self._line.discard(held, rank=rank, tenant=tenant)

    def release(self) -> None:
        """Let as many go as may. One tenant's that has no room yet isn't in the way of another's."""
        while (tenant := self._whose_turn()) is not None:
            held = self._line.take(tenant)
            held.line = None
            self._admission.released(held.entry)
            held.release()

    def _whose_turn(self) -> int | None:
        """The first tenant whose next one may go; None where none may."""
        for tenant, held in islice(self._line.firsts(), MOST_LOOKS):
            if self._admission.has_room(held.entry):
                return tenant
        return None
