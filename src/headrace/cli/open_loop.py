"""Requests that come at moments of their own, whether or not those before them are done, as those of many users do.

There may be hundreds a second, most of them refused at once, on a machine that the server has use for: so a request takes no task and no
timer of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from headrace.cli.load_client import TIMEOUT, Address, Answer, Connection, Failure, Lost, Sample, goes_on, sample, unreachable, wrong

LOOK = 0.1
"""Seconds between looks for requests whose time is up."""


class _Visit:
    """A request under way."""

    __slots__ = ("answer", "connection", "kept", "number", "over", "started")

    def __init__(self, number: int, answer: Answer) -> None:
        self.number = number
        self.answer = answer
        self.started = time.perf_counter()
        self.connection: Connection | None = None
        self.kept = False
        """The connection had been used before."""
        self.over = False


class OpenLoop:
    """Sends `requests`, each as many seconds after the start as `arrivals`, which are in order, say. `timeout`: seconds for one request.
    `prompts`: tokens of each prompt, where they were counted beforehand."""

    def __init__(
        self,
        address: Address,
        requests: Sequence[bytes],
        arrivals: Sequence[float],
        *,
        timeout: float,
        prompts: Sequence[int | None],
        on_done: Callable[[Sample], None],
    ) -> None:
        self._address = address
        self._requests = requests
        self._arrivals = arrivals
        self._timeout = timeout
        self._prompts = prompts
        self._on_done = on_done
        self._idle: list[Connection] = []
        self._under_way: dict[int, _Visit] = {}
        """By number, in order of arrival."""
        self._connecting: set[asyncio.Task[None]] = set()
        self._next = 0
        self._left = len(arrivals)

    async def run(self) -> None:
        """Until all have ended."""
        if not self._arrivals:
            return
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._begun = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        self._looking = self._loop.call_later(LOOK, self._look)
        self._arrive()
        try:
            await self._over
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._looking.cancel()
            for task in self._connecting:
                task.cancel()
            for connection in self._idle:
                connection.close()

    def _arrive(self) -> None:
        """Those whose moment has come."""
        arrivals = self._arrivals
        since = time.perf_counter() - self._begun
        while self._next < len(arrivals) and arrivals[self._next] <= since:
            number = self._next
            self._next += 1
            visit = self._under_way[number] = _Visit(number, Answer(self._address.native, self._prompts[number]))
            self._send(visit)
        if self._next < len(arrivals):
            # uvloop's clock goes by milliseconds, and a timer may be half of one early.
            self._timer = self._loop.call_later(arrivals[self._next] - since + 0.0005, self._arrive)

    def _send(self, visit: _Visit) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                visit.kept = True
                self._over_it(visit, connection)
                return
        self._connect(visit)

    def _connect(self, visit: _Visit) -> None:
        task = self._loop.create_task(self._send_over_new(visit))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _send_over_new(self, visit: _Visit) -> None:
        visit.kept = False
        try:
            connection = await self._address.connect()
        except OSError as failure:
            self._end(visit, unreachable(failure))
            return
        if visit.over:
            self._idle.append(connection)
        else:
            self._over_it(visit, connection)

    def _over_it(self, visit: _Visit, connection: Connection) -> None:
        visit.connection = connection
        connection.begin(self._requests[visit.number], visit.answer, partial(self._told, visit))

    def _told(self, visit: _Visit, outcome: int | Failure) -> None:
        if visit.over:
            return
        if isinstance(outcome, int):
            self._end(visit, wrong(outcome, visit.answer))
        elif isinstance(outcome, Lost) and visit.kept:
            self._connect(visit)
        else:
            self._end(visit, str(outcome))

    def _end(self, visit: _Visit, error: str | None) -> None:
        if visit.over:
            return
        visit.over = True
        del self._under_way[visit.number]
        if visit.connection is not None:
            if goes_on(error):
                self._idle.append(visit.connection)
            else:
                visit.connection.close()
        self._on_done(sample(visit.number, visit.started, visit.answer, error))
        self._left -= 1
        if not self._left and not self._over.done():
            self._over.set_result(None)

    def _look(self) -> None:
        late = time.perf_counter() - self._timeout
        for visit in list(self._under_way.values()):
            if visit.started > late:
                break
            self._end(visit, TIMEOUT)
        self._looking = self._loop.call_later(LOOK, self._look)
