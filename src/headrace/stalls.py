"""When is a worker stopped or hung? Judged by its pulse alone: it is never asked anything.

What a watcher measures is the time in which it looked and nothing changed. A watcher that was itself stopped, or got no processor,
or slept with the whole machine, has not looked; and the time in which the worker waited for a processor is not the worker's fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from headrace.engine.pulse import Pulse, Reading

LOOKS = 0.2
"""Seconds between looks at a pulse."""
MOST_A_LOOK = 0.5
"""Seconds that one look may add to the time that was watched, however long ago the one before was."""
LOADING = 900.0
"""Seconds that a process may take until its engine is ready; large models are compiled for minutes."""
STEP_FACTOR = 3.0
"""A step may take so many times as long as it was expected to."""
PATIENCE = 4.0
"""After so many times the limit a worker is hung, even if all the while it waited for a processor."""
_SUSPICION = 2 * MOST_A_LOOK


class WatchedTime:
    """A clock that goes on only while somebody looks at it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self.now = 0.0

    def look(self) -> float:
        """Seconds that were watched so far."""
        now = self._clock()
        self.now += min(now - self._looked, MOST_A_LOOK)
        self._looked = now
        return self.now


class _Quiet:
    """For how long something has not changed."""

    def __init__(self) -> None:
        self._value: object = None
        self._since = 0.0
        self._delays: dict[int, float] | None = None

    def of(self, value: object, now: float, delays: Callable[[], dict[int, float]]) -> tuple[float, float]:
        """Seconds without a change, and how many of them a thread of the process waited for a processor."""
        if value != self._value:
            self._value, self._since, self._delays = value, now, None
        quiet = now - self._since
        if quiet < _SUSPICION:
            return quiet, 0.0
        if self._delays is None:
            self._delays = delays()
        before = self._delays
        return quiet, max((seconds - before.get(thread, 0.0) for thread, seconds in delays().items()), default=0.0)


class StallWatch:
    """Watches one process from its start. `delays` tells the seconds that each of its threads has waited for a processor, `stopped`
    whether a signal stopped it: both are the system's word, and may know nothing."""

    def __init__(
        self,
        pulse: Pulse,
        stall_timeout: float,
        *,
        now: float,
        delays: Callable[[], dict[int, float]] = dict,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pulse = pulse
        self._stall_timeout = stall_timeout
        self._began = now
        self._delays = delays
        self._stopped = stopped
        self._running = now
        self._loop, self._steps = _Quiet(), _Quiet()

    def look(self, now: float, *, ready: bool) -> str:
        """Why the process has to be replaced, for a person; empty while it is well."""
        if not ready:
            return self._look_at_loading(now)
        reading = self._pulse.read()
        limit = max(self._stall_timeout, STEP_FACTOR * reading.expected)
        quiet, delay = self._loop.of(reading.beats, now, self._delays)
        if _too_long(quiet, delay, limit):
            return f"Nothing has moved in the engine's process for {quiet:.1f} s: it was stopped, or hangs."
        quiet, delay = self._steps.of((reading.steps, reading.busy), now, self._delays)
        if reading.busy and _too_long(quiet, delay, limit):
            return f"The engine's step loop has made no progress for {quiet:.1f} s; the step was expected to take {reading.expected:.2f} s."
        return ""

    @property
    def reading(self) -> Reading:
        return self._pulse.read()

    def _look_at_loading(self, now: float) -> str:
        if not self._stopped():
            self._running = now
        if now - self._running >= self._stall_timeout:
            return f"The engine's process was stopped for {now - self._running:.1f} s while it loaded the model."
        if now - self._began >= LOADING:
            return f"The engine was not ready {now - self._began:.0f} s after its process began."
        return ""


def _too_long(quiet: float, delay: float, limit: float) -> bool:
    return quiet - delay >= limit or quiet >= PATIENCE * limit


def waited_for_processor(pid: int) -> dict[int, float]:
    """Seconds that each thread of a process was ready to run and had no processor; empty where the system doesn't say."""
    delays = {}
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            delays[int(task.name)] = int((task / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # not Linux, a kernel without these figures, or a process that just ended
        return {}
    return delays


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; False where the system doesn't say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
