"""Streaming answers: straight to `send`, one write for each batch of events, and over within a step of a hang-up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar, cast

import structlog
from starlette.types import Receive, Scope, Send

from headrace.call import Call, Sink
from headrace.errors import HeadraceError
from headrace.http.exchange import exchange_of
from headrace.http.hangup import ClientGone, Watch
from headrace.http.line import Line
from headrace.http.problems import unexpected
from headrace.http.serving import Runs
from headrace.http.sse import KEEP_ALIVE
from headrace.types import Event

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Pieces = AsyncGenerator[bytes]


class EncodesEvents(Protocol):
    """A dialect's way of writing one call's events."""

    def batch(self, events: list[Event]) -> bytes:
        """Raises `HeadraceError` for an event that says the engine failed."""
        ...


async def encoded(journey: Runs, call: Call, encoder: EncodesEvents) -> Pieces:
    """A call's events as bytes of the stream."""
    async with aclosing(journey.run(call)) as batches:
        async for batch in batches:
            yield encoder.batch(batch)


def as_they_are(piece: bytes) -> bytes:
    """For sources that give bytes already."""
    return piece


Given = TypeVar("Given")


class Streamed(Generic[Given]):
    """An event stream, made of what a source gives, piece by piece.

    The first piece is waited for before the headers are sent, so that a refusal keeps its HTTP status; only when it takes longer
    than `keep_alive` seconds the headers go first. An error after that is an event, made by `problem`; `closing` makes the end.
    `call`: the one whose events the source gives, where it is no more than one; on a connection of ours they are then written the moment
    they are there (`call.Sink`), without a task's being woken.
    """

    __slots__ = (
        "_call",
        "_closing",
        "_encode",
        "_keep_alive",
        "_last",
        "_line",
        "_ping",
        "_problem",
        "_send",
        "_send_body",
        "_source",
        "_started",
        "_writing",
    )

    _send: Send
    _send_body: Send
    _line: Line

    def __init__(
        self,
        source: AsyncGenerator[Given],
        encode: Callable[[Given], bytes],
        *,
        closing: Callable[[], bytes],
        problem: Callable[[HeadraceError], bytes],
        keep_alive: float,
        call: Call | None = None,
    ) -> None:
        self._source = source
        self._call = call
        self._encode = encode
        self._closing = closing
        self._problem = problem
        self._keep_alive = keep_alive
        self._started = False
        self._writing = False
        self._ping: asyncio.Future[None] | None = None
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises the `HeadraceError` that refused the request, if nothing was sent yet, and `ClientGone`."""
        exchange, call = exchange_of(scope), self._call
        self._send = send
        self._send_body = exchange.send or send
        try:
            async with Watch(receive, exchange.line, self._idle, self._keep_alive), aclosing(self._source):
                async for given in self._source:
                    await self._write(self._encode(given))
                    if call is not None and call.sink is None and exchange.line is not None and exchange.line.in_chunks:
                        self._line, call.sink = exchange.line, cast(Sink, self)
                last = self._closing()
        except ClientGone:
            raise
        except HeadraceError as error:
            if not self._started:
                raise
            exchange.error = error
            last = self._problem(error)
        except Exception as error:
            if not self._started:
                raise
            exchange.error = error
            # The status is out, so the edge can't tell the client any more.
            structlog.get_logger("headrace.http").exception("stream failed")
            last = self._problem(unexpected())
        finally:
            if call is not None:
                call.sink = None  # else there were a cycle of all that belongs to the request
        await self._start()
        await self._send_body({"type": "http.response.body", "body": last})

    async def _start(self) -> None:
        if not self._started:
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            # Not before: a comment's turn may be cancelled while it waits for a connection that takes nothing yet.
            self._started = True
            if self._call is not None:
                self._call.headers_sent = True

    async def _write(self, piece: bytes) -> None:
        if self._ping is not None:
            await self._ping
        if not self._started:
            await self._start()
        if piece:
            self._last = time.monotonic()
            self._writing = True
            await self._send_body({"type": "http.response.body", "body": piece, "more_body": True})
            self._writing = False

    def ready(self) -> bool:
        """`call.Sink`, as is the next."""
        return self._line.open and self._ping is None

    def put(self, batch: Given) -> None:
        piece = self._encode(batch)
        if piece:
            self._last = time.monotonic()
            self._line.write(piece)

    async def _idle(self) -> float:
        """Send a comment if nothing was sent for too long. Runs beside the stream, so neither may be amid a write of the other."""
        waited = time.monotonic() - self._last
        if waited < self._keep_alive:
            return self._keep_alive - waited
        if not self._writing:
            ping = self._ping = asyncio.get_running_loop().create_future()
            try:
                await self._start()
                await self._send_body({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            finally:
                self._ping = None
                if not ping.done():  # a hang-up cancels it with the task that waits for it
                    ping.set_result(None)
        self._last = time.monotonic()
        return self._keep_alive
