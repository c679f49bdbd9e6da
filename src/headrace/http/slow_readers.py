"""Clients that don't read what they asked for: little is held for each, and not for long.

A stream's text waits in three places for a client that doesn't read it: in the engine's client (`engines.HELD`), in the connection's own
buffer (`WRITE_BUFFER`) and in the kernel's (`SEND_BUFFER`). Together they hold at most 64 KiB. Then the stream rests, and its sequence
is out of the engine; it goes on when the client reads. A client that acknowledges nothing for `slow_client_timeout` seconds is cut
off, which is a hang-up for everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from typing import Any

import structlog

from headrace.http.line import LinedConnection

WRITE_BUFFER = 16 * 1024
"""Bytes in a connection's own buffer at which writers have to wait."""
SEND_BUFFER = 16 * 1024
"""Bytes that the kernel is asked to keep for a connection; Linux doubles them, for its own book-keeping. A round trip carries at most so
much: at 100 ms some 160 KiB a second."""
SEGMENT = 1460
"""Most bytes of a segment."""
_BYTES_ACKED = slice(120, 128)
"""Of Linux' `struct tcp_info`: what the other side has acknowledged."""


class Connection(LinedConnection):
    """uvicorn's connection, with a smaller buffer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=WRITE_BUFFER, low=WRITE_BUFFER // 4)
        super().connection_made(transport)


def hold_little(listening: socket.socket) -> None:
    """Connections that it accepts get small send buffers, and segments of Ethernet's size: a machine that is sent larger ones, as on
    loopback, tells of what its reader has read in larger steps, too."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)


class SlowReaders:
    """Cuts off connections whose client has acknowledged nothing for `timeout` seconds, though something waits to be sent."""

    def __init__(self, timeout: float, connections: Iterable[Any]) -> None:
        self._timeout = timeout
        self._connections = connections
        self._stuck: dict[Any, tuple[int, float]] = {}
        """With how far each was, and since when."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            self.look(asyncio.get_running_loop().time())

    def look(self, now: float) -> None:
        """Find who made no progress since the last looks."""
        before, self._stuck = self._stuck, {}
        for connection in list(self._connections):
            transport = connection.transport
            waiting = 0 if transport is None else transport.get_write_buffer_size()
            if not waiting:
                continue
            reached = _acknowledged(transport)
            if reached is None:
                # What waits gets less only when the client reads.
                reached = -waiting
            known = before.get(connection)
            if known is None or known[0] != reached:
                self._stuck[connection] = reached, now
            elif now - known[1] < self._timeout:
                self._stuck[connection] = known
            else:
                structlog.get_logger("headrace.http").warning(
                    "slow client cut off", address=connection.client[0] if connection.client else "", seconds=self._timeout
                )
                transport.abort()


def _acknowledged(transport: asyncio.Transport) -> int | None:
    """Bytes that the client's machine has taken; None where the system doesn't say."""
    sock = transport.get_extra_info("socket")
    if sock is None or not hasattr(socket, "TCP_INFO"):
        return None
    try:
        told: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
    except OSError:
        return None
    return int.from_bytes(told[_BYTES_ACKED], "little") if len(told) == _BYTES_ACKED.stop else None
