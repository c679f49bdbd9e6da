"""Noticing that a client hung up, while its answer is being made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType

from starlette.types import Receive

from headrace.http.line import Line

Idle = Callable[[], Awaitable[float]]
"""Called now and then while the client waits; returns the seconds until the next time."""


class ClientGone(Exception):
    """The client hung up: nobody is left to answer."""


class Watch:
    """Within it, a hang-up cancels what the task awaits, at once; then it raises `ClientGone`.

    `pause`: seconds until `idle` is called first. Without a `line` a task waits for what `receive` says.
    The body must have been read. Leave the watch before the response is completed: servers report that as a disconnect, too.
    """

    __slots__ = ("_gone", "_idle", "_line", "_pause", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive, line: Line | None, idle: Idle | None = None, pause: float | None = None) -> None:
        self._receive = receive
        self._line = line
        self._idle = idle
        self._pause = pause
        self._gone = False
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._line is None:
            self._watcher = asyncio.create_task(self._watch())
        else:
            self._line.watch(self._lost)
            self._wait()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._line is not None:
            self._line.unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watcher is not None:
            self._watcher.cancel()
            # The cancellation's traceback leads back here: a cycle of all that belongs to the request, for the garbage collector to find.
            self._watcher = None
        if not self._gone:
            return
        if not isinstance(error, asyncio.CancelledError):
            # The work ended in the same instant; its cancellation is still to be delivered.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        self._task.uncancel()
        raise ClientGone from None

    def _lost(self) -> None:
        self._gone = True
        self._task.cancel()

    def _wait(self) -> None:
        if self._idle is not None and self._pause is not None:
            self._timer = asyncio.get_running_loop().call_later(self._pause, self._pause_over, self._idle)

    def _pause_over(self, idle: Idle) -> None:
        self._timer = None
        self._watcher = asyncio.create_task(self._call(idle))

    async def _call(self, idle: Idle) -> None:
        try:
            self._pause = await idle()
        except OSError:
            self._lost()
        else:
            self._watcher = None
            self._wait()

    async def _watch(self) -> None:
        try:
            while True:
                if await self._disconnected():
                    break
                if self._idle is not None:
                    self._pause = await self._idle()
        except OSError:
            pass
        self._lost()

    async def _disconnected(self) -> bool:
        """True at a hang-up, False when the pause is over."""
        try:
            async with asyncio.timeout(self._pause):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        return True
        except TimeoutError:
            return False
