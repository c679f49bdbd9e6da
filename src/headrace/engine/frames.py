"""What API processes and engine workers say to each other: length-prefixed msgspec frames over a unix stream socket.

A frame is four bytes of length, big-endian, and one message in MessagePack. A stream socket shows a peer's
death as an end of file, at once. A frame that is too long or does not decode ends its connection: the two
sides can't agree on anything after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec
import structlog

from headrace.types import EngineCard, EngineStats, Event, GenerateRequest, Report
from headrace.waiting import Bounds, Queue

MAX_FRAME = 256 * 1024 * 1024
"""Bytes; the scores of a long prompt with many alternatives are the largest honest frame."""
MAX_UNREAD = 64 * 1024 * 1024
"""Bytes that may wait for a peer that doesn't read, before it is given up."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """API process to worker: run this. `handle` names it on this connection, and is never used again there."""

    handle: int
    request: GenerateRequest
    slot: int = -1
    """Where its tokens are counted, in the file of `Counting`; -1 is nowhere."""
    suspect: bool = False
    """An engine died of a step that it was in: run it alone, until it has got on."""
    again: bool = False
    """Another engine had let it in before."""


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """API process to worker: nobody wants the rest. All that is still said of this handle is `Ended`."""

    handle: int


class StatsRequest(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """API process to worker: how is the loop?"""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Worker to API process, first and once: the engine is ready and this is what it is."""

    card: EngineCard
    pid: int


class Step(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Worker to API process: what one step of the engine made for all of this connection's requests."""

    batches: list[tuple[int, list[Event]]]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Worker to API process: the request ended with this error (`errors.revive` makes it one again)."""

    handle: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Stats(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Worker to API process: the answer to `StatsRequest`."""

    stats: EngineStats


class Counting(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """API process to worker, before any `Submit` with a slot: the file with this process's slots."""

    path: str


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Worker to API process, after a `Cancel`: the engine is done with it, and its slot says what it has cost."""

    handle: int
    report: Report | None = None
    """None where the engine made none."""


class Crowded(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Worker to API process, while requests are refused: the queue as it is, so that others can be refused without asking."""

    queue: Queue
    bounds: Bounds


ToWorker = Submit | Cancel | StatsRequest | Counting
FromWorker = Hello | Step | Failed | Stats | Ended | Crowded

Incoming = TypeVar("Incoming")


class FrameTooLarge(ValueError):
    """A message would not fit a frame; nothing was sent."""


class FrameConnection(asyncio.Protocol, Generic[Incoming]):
    """One end of a connection: decodes whole frames and hands each message on; sends messages as frames.

    `received` is called with each message, `lost` once when the connection has ended, whoever ended it, and
    `made` once when it begins. The peer is given up when more than `max_unread` bytes wait for it.
    """

    def __init__(
        self,
        incoming: Any,
        received: Callable[[Incoming], None],
        lost: Callable[[], None],
        *,
        made: Callable[[FrameConnection[Incoming]], None] | None = None,
        max_frame: int = MAX_FRAME,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self._decode: Callable[[Any], Incoming] = msgspec.msgpack.Decoder(incoming).decode
        self._encoder = msgspec.msgpack.Encoder()
        self._scratch = bytearray()
        self._received = received
        self._lost = lost
        self._made = made
        self._max_frame = max_frame
        self._max_unread = max_unread
        self._partial = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        if self._made is not None:
            self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < 4 or len(partial) - 4 < int.from_bytes(partial[:4], "big") <= self._max_frame:
                return
            data = bytes(partial)
            partial.clear()
        view = memoryview(data)
        begin, end = 0, len(data)
        while end - begin >= 4:
            length = int.from_bytes(view[begin : begin + 4], "big")
            if length > self._max_frame:
                self._give_up(f"a frame of {length} bytes; the most is {self._max_frame}")
                return
            after = begin + 4 + length
            if after > end:
                break
            try:
                message = self._decode(view[begin + 4 : after])
            except (msgspec.DecodeError, RecursionError) as error:
                self._give_up(f"a malformed frame: {error}")
                return
            begin = after
            self._received(message)
            if self._transport is None or self._transport.is_closing():
                return
        if begin < end:
            partial += view[begin:]

    def send(self, message: Any) -> None:
        """Send a message; to a connection that has ended, nothing.

        Raises `FrameTooLarge`, and `UnicodeEncodeError` for text with half a surrogate pair.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        scratch = self._scratch
        self._encoder.encode_into(message, scratch, 4)
        length = len(scratch) - 4
        if length > self._max_frame:
            self._scratch = bytearray()
            raise FrameTooLarge(f"a frame of {length} bytes; the most is {self._max_frame}")
        if transport.get_write_buffer_size() > self._max_unread:
            self._give_up(f"the peer left more than {self._max_unread} bytes unread")
            return
        scratch[:4] = length.to_bytes(4, "big")
        transport.write(bytes(scratch))

    def close(self) -> None:
        """Send what is buffered, then end the connection."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now, whatever is still to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self, why: str) -> None:
        structlog.get_logger("headrace.frames").warning("connection closed", reason=why)
        if self._transport is not None:
            self._transport.abort()
