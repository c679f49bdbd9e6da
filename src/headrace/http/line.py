"""The connection behind an answer, for what ASGI has no words for: writing without waiting, and a hang-up that is heard without a task."""

from __future__ import annotations

from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from headrace.http.upgrade_offers import IgnoresOffers

LINE = "headrace.line"
"""Where a request's scope has it."""


class LinedConnection(IgnoresOffers):
    """uvicorn's connection; each of its requests has a `Line`."""

    line: Line | None = None
    """Of the request that is being answered; those that follow it wait."""

    def on_headers_complete(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            # The request's task was made, and hasn't begun.
            self.cycle.scope[LINE] = Line(self, self.cycle)  # type: ignore[literal-required]

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


class Line:
    """A request's hold on its connection."""

    __slots__ = ("_connection", "_cycle", "_told", "_write", "open")

    def __init__(self, connection: LinedConnection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self._told: Callable[[], None] | None = None
        self._write: Callable[[bytes], None] = cycle.transport.write
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
