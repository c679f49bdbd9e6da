"""How an API process leaves without breaking a connection: every accepted request is answered, and no connection is reset.

A connection that is idle may carry a request at any moment, and one that is queued for acceptance may have brought its request already.
So the process goes on accepting and serving for a moment after it was told to leave, asks every client with `Connection: close` not
to come back, closes idle connections only when nothing has arrived on them, and stops accepting when the queue is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import uvicorn

LAST_CALL = 0.5
"""Seconds after a stop was ordered in which new requests are still served as ever."""
IDLE = 0.25
"""Seconds without a request after which a connection is closed by a process that leaves."""
HANDSHAKES = 0.1
"""Seconds for connections that were being made when no new ones were let in any more."""
_TICK = 0.02


class LeavingServer(uvicorn.Server):
    """uvicorn without its signal handlers, which takes leave of its connections as described above. `listening` is set once it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.background: list[asyncio.Task[None]] = []
        """Held here: the loop itself keeps only weak references."""
        self._sockets: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._sockets = sockets or []
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def leave(self) -> None:
        """Accept nothing more from now on: others do, on the same socket. What is here is served to its end."""
        for server in self.servers:
            server.close()
        self.should_exit = True

    async def say_goodbye(self, last_call: float, refuse: Callable[[], None], quiet: Callable[[], Awaitable[None]]) -> None:
        """The server stops: serve for `last_call` seconds (none where nobody is connected), `refuse` what comes later, wait for what runs,
        then for `quiet`, which returns once no new connections are let in, and accept and answer those that are queued."""
        until = time.monotonic() + last_call
        while time.monotonic() < until and (self.server_state.connections or self._queued()):  # noqa: ASYNC110  (neither tells us)
            await asyncio.sleep(_TICK)
        refuse()
        running = [task for task in self.server_state.tasks if not task.done()]
        if running:
            await asyncio.wait(running)
        await quiet()
        await asyncio.sleep(HANDSHAKES if self.server_state.connections else 0)
        while self._queued():  # noqa: ASYNC110
            await asyncio.sleep(_TICK)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        idle_since: dict[Any, float] = {}
        dated = time.monotonic()
        connections: set[Any] = self.server_state.connections
        while connections or self.server_state.tasks:
            now = time.monotonic()
            for connection in list(connections):
                if not _at_rest(connection):
                    idle_since.pop(connection, None)
                elif now - idle_since.setdefault(connection, now) >= IDLE:
                    connection.shutdown()
            if now - dated >= 1:
                # The date in answers' headers.
                await self.on_tick(0)
                dated = now
            await asyncio.sleep(_TICK)

    def _queued(self) -> bool:
        """Whether a connection waits to be accepted."""
        return any(_readable(sock.fileno()) for sock in self._sockets)


def _at_rest(connection: Any) -> bool:
    """No answer is under way, none is being sent, and nothing has arrived that would want one."""
    cycle, transport = connection.cycle, connection.transport
    if cycle is not None and not cycle.response_complete:
        return False
    if transport is None or transport.is_closing() or transport.get_write_buffer_size():
        return False
    sock = transport.get_extra_info("socket")
    return sock is None or not _readable(sock.fileno())


def _readable(fd: int) -> bool:
    if fd < 0:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
