"""Tells API processes of the queue for as long as requests are refused, so that they can refuse by themselves (`policies/admit.py`).

What they refuse never comes here. So it isn't only a refusal that keeps the news coming, but also that the request which was refused last
would be refused again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.engine.admission import Admission
from headrace.types import GenerateRequest
from headrace.waiting import Bounds, Newcomer, Queue, foreseen

CROWDED = 1.0
"""Seconds for which news go on after it was last seen that requests are refused."""
TELL_INTERVAL = 0.05
"""Seconds between two messages. Each wakes every API process, on processors that the engine has use for."""


class Crowding:
    """`tell` sends a snapshot to all API processes."""

    def __init__(self, admission: Admission, tell: Callable[[Queue, Bounds], None]) -> None:
        self._admission = admission
        self._tell = tell
        self._until = float("-inf")
        self._refused = Newcomer(0)
        """Who was refused last."""
        self._telling: asyncio.TimerHandle | None = None

    def refused(self, request: GenerateRequest) -> None:
        """That request was not let in, or put out."""
        # Its deadline is its own matter: by that it might be refused for ever.
        self._refused = Newcomer(request.tenant, request.priority, len(request.prompt), request.sampling.n)
        self._crowded()

    def changed(self) -> None:
        """The queue isn't as it was."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._until:
                self._telling = loop.call_later(TELL_INTERVAL, self._say)

    def _crowded(self) -> None:
        self._until = asyncio.get_running_loop().time() + CROWDED
        self.changed()

    def _say(self) -> None:
        self._telling = None
        queue, bounds = self._admission.queue(), self._admission.bounds
        self._tell(queue, bounds)
        if foreseen(queue, bounds, self._refused) is not None:
            self._crowded()
