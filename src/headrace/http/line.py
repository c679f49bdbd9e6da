"""The connection behind an answer, for what ASGI has no words for: writing without waiting, and a hang-up that is heard without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from headrace.http.upgrade_offers import IgnoresOffers

if TYPE_CHECKING:
    from headrace.http.door import Door, Key
    from headrace.http.exchange import Exchange

LINE = "headrace.line"
"""Where a request's scope has it."""


_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""An answer before the answer, of a client that waits for it before it sends its body."""


class LinedConnection(IgnoresOffers):
    """uvicorn's connection; each of its requests has a `Line`."""

    line: Line | None = None
    """Of the request that is being answered; those that follow it wait."""
    door: Door | None = None
    _key: Key | None = None
    """Of the request that was received last, if it may be noted at the door."""
    _amid = False
    """A request has begun, and isn't all there."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        state = getattr(self.app, "state", None)
        self.door = getattr(state, "door", None)

    def data_received(self, data: bytes) -> None:
        self._key = None
        if self.door is not None and self.client is not None and self._is_free():
            found = self.door.key_of(self.client[0], data)
            if found is not None:
                self._key, size = found
                refused = self.door.refusal(self._key, data, size)
                if refused is not None:
                    self._refuse(self.door, *refused)
                    return
        super().data_received(data)

    def _is_free(self) -> bool:
        """Nothing is under way, and the client reads."""
        done = self.cycle is None or self.cycle.response_complete
        return done and not self._amid and not self.flow.write_paused and not self.transport.is_closing()

    def _refuse(self, door: Door, exchange: Exchange, head: bytes, body: bytes) -> None:
        self._unset_keepalive_if_required()
        common = b"".join([b"%b: %b\r\n" % header for header in self.server_state.default_headers])
        ours = b"x-request-id: %b\r\nx-content-type-options: nosniff\r\n\r\n" % exchange.id.encode()
        self.transport.write(head + common + ours + body)
        door.close(exchange)
        self.on_response_complete()

    def on_message_begin(self) -> None:
        self._amid = True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._amid = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            # The request's task was made, and hasn't begun.
            self.cycle.scope[LINE] = Line(self, self.cycle, self._key)  # type: ignore[literal-required]
            if self.cycle.scope["method"] != "HEAD":  # there, nothing follows the head
                self.cycle.transport = cast(asyncio.Transport, HeadWithBody(self.transport))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.line is not None:
            self.line.lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.line is not None:
            self.line.open = False

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.line is not None:
            self.line.open = True


class HeadWithBody:
    """What uvicorn knows of the transport while it writes one answer: the head is kept until the first of the body comes, and both are
    sent as one. A client that gets them in two segments is woken twice, and each write is a system call.
    """

    __slots__ = ("_head", "_kept", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._kept = False

    def write(self, data: bytes) -> None:
        if self._kept:
            if self._head:
                data, self._head = self._head + data, b""
            self._transport.write(data)
        elif data == _CONTINUE:
            self._transport.write(data)
        else:
            self._head, self._kept = data, True

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class Line:
    """A request's hold on its connection."""

    __slots__ = ("_connection", "_cycle", "_told", "_write", "key", "open")

    def __init__(self, connection: LinedConnection, cycle: RequestResponseCycle, key: Key | None = None) -> None:
        self.key = key
        """By which the request may be noted at the door."""
        self._connection = connection
        self._cycle = cycle
        self._told: Callable[[], None] | None = None
        self._write: Callable[[bytes], None] = connection.transport.write
        self.open = False
        """While it is watched: nothing that was written waits for the client to read."""

    @property
    def in_chunks(self) -> bool:
        """Whether the answer has begun, and is of a length that nobody knows."""
        return bool(self._cycle.chunked_encoding)

    def write(self, piece: bytes) -> None:
        """A piece of the body, which isn't empty, of an answer that is in chunks, on a line that is open."""
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def watch(self, told: Callable[[], None]) -> None:
        """`told` is called when the client hangs up, at once if it has done so. The request's body must have been read."""
        flow = self._cycle.flow
        flow.resume_reading()
        if self._cycle.disconnected or self._cycle.transport.is_closing():
            self._cycle.disconnected = True
            told()
        else:
            self._told = told
            self.open = not flow.write_paused
            self._connection.line = self

    def unwatch(self) -> None:
        self._connection.line = self._told = None
        self.open = False

    def lost(self) -> None:
        self.open = False
        # uvicorn tells only the last request that came; others may be in line behind this one.
        self._cycle.disconnected = True
        if self._told is not None:
            self._told()
