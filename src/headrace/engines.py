"""The client of an engine worker: `ports.Engine` over the worker's socket.

The connection is made again whenever it ends. A request that the engine has not begun to answer doesn't notice
that: it waits, within its deadline, and is submitted to the next worker. What becomes of a request that is under way
when its worker dies is decided in one place, `EngineClient._after_death`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, Callable

import msgspec
import structlog

from headrace.engine.frames import (
    Cancel,
    Counting,
    Ended,
    Failed,
    FrameConnection,
    FrameTooLarge,
    FromWorker,
    Hello,
    Stats,
    StatsRequest,
    Step,
    Submit,
)
from headrace.errors import BadRequest, BodyTooLarge, DeadlineExceeded, EngineDied, EngineUnavailable, HeadraceError, revive
from headrace.ports import Meters
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, Report

GRACE = 1.0
"""Seconds after a deadline in which the worker may still end a request itself, and say where the time went."""
ADRIFT = 0.02
"""Seconds between looks at whether a worker that was lost still counts."""
MAX_SUBMISSIONS = 3
"""A request that saw this many workers die before its first token is ended: it may be the reason."""


class _Stream:
    """A request of this API process, from `generate` to its end."""

    __slots__ = ("began", "deadline", "done", "error", "handle", "pending", "request", "seen", "slot", "submissions", "timer", "waiter")

    def __init__(self, request: GenerateRequest, handle: int, now: float, patience: float) -> None:
        self.request = request
        self.handle = handle
        self.deadline = now + (patience if request.timeout is None else request.timeout)
        self.pending: list[Event] = []
        """Arrived and not read; a slow reader finds them in one batch."""
        self.began = False
        """True once the worker has sent anything for it."""
        self.submissions = 0
        self.seen = 0
        """Tokens that were read, of a request that is counted."""
        self.slot: int | None = None
        """Where it is counted, from the first submission to the last engine's end; -1 for a request that is on no bill."""
        self.done = False
        self.error: HeadraceError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: HeadraceError) -> None:
        if not self.done and self.error is None:
            self.error = error
            self.wake()


class EngineClient:
    """An engine that lives in a worker process, behind the unix socket at `path`.

    `patience`: seconds that a request without a timeout waits for a worker. `on_ready` is called whenever a worker
    said what it is, `on_lost` whenever a connection to a ready worker ended. `meters` is where requests are counted that are on a bill.
    """

    def __init__(
        self,
        path: str,
        *,
        patience: float = 600.0,
        on_ready: Callable[[EngineCard], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._path = path
        self._patience = patience
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._meters = meters
        self._left: dict[int, _Stream] = {}
        """Cancelled, and the worker has not said yet that it is done with them."""
        self._adrift: set[asyncio.Task[None]] = set()
        self._worker_pid = 0
        self._handles = itertools.count(1)
        self._submitted: dict[int, _Stream] = {}
        self._waiting: dict[int, _Stream] = {}
        self._connection: FrameConnection[FromWorker] | None = None
        """Set from a worker's hello to the end of its connection."""
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._card: EngineCard | None = None
        self._stats = EngineStats()
        self._stats_waiters: list[asyncio.Future[None]] = []
        self._unavailable: HeadraceError | None = None
        self._closed: HeadraceError | None = None

    # Life

    def connect(self) -> None:
        """Begin to keep a connection, whether or not a worker is there yet."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_connected(), name=f"engine {self._path}")

    async def start(self) -> EngineCard:
        """Connect, and wait for a worker that is ready."""
        self.connect()
        await self._ready.wait()
        assert self._card is not None
        return self._card

    @property
    def ready(self) -> bool:
        return self._connection is not None

    @property
    def waiting(self) -> int:
        """Requests of this process that wait for a worker."""
        return len(self._waiting)

    def give_up(self, error: HeadraceError) -> None:
        """No worker will come: waiting requests end with `error`, and so do new ones until `hope`."""
        self._unavailable = error
        for stream in [*self._waiting.values()]:
            stream.fail(error)

    def hope(self) -> None:
        """Workers are being started again."""
        self._unavailable = None

    def end_all(self, error: HeadraceError) -> None:
        """End every request with `error`, and refuse new ones with it."""
        self._closed = error
        for stream in [*self._waiting.values(), *self._submitted.values()]:
            stream.fail(error)

    async def close(self) -> None:
        """End every request and the connection. Idempotent."""
        self.end_all(EngineUnavailable("The server is stopping.", retry_after=1))
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self._connection is not None:
            self._connection.close()
        for task in self._adrift:
            task.cancel()

    # Requests

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        """Events of one request. Closing the generator cancels it in the worker.

        Raises what the engine raised; `EngineDied` if the worker died under way; `EngineUnavailable` or
        `DeadlineExceeded` if none was there in time; `BodyTooLarge` if the request doesn't fit a frame.
        """
        stream = self._open(request)
        try:
            while True:
                if stream.pending:
                    batch = stream.pending
                    stream.pending = []
                    if stream.slot is not None and stream.slot >= 0:
                        stream.seen += sum([len(event.tokens) for event in batch if type(event) is Delta])
                    yield batch
                elif stream.done:
                    return
                elif stream.error is not None:
                    raise stream.error
                else:
                    stream.waiter = asyncio.get_running_loop().create_future()
                    await stream.waiter
        finally:
            self._forget(stream)

    def _open(self, request: GenerateRequest) -> _Stream:
        refusal = self._closed or self._unavailable
        if refusal is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        stream = _Stream(request, next(self._handles), loop.time(), self._patience)
        stream.timer = loop.call_at(stream.deadline, self._at_deadline, stream)
        self._waiting[stream.handle] = stream
        if self._connection is not None:
            try:
                self._submit(stream, self._connection)
            except BaseException:
                self._forget(stream)
                raise
        return stream

    def _submit(self, stream: _Stream, connection: FrameConnection[FromWorker], waited: bool = False) -> None:
        request = stream.request
        if waited and request.timeout is not None:
            request = msgspec.structs.replace(request, timeout=max(0.001, stream.deadline - asyncio.get_running_loop().time()))
        if stream.slot is None:
            stream.slot = -1 if self._meters is None else self._meters.begin(request.id)
        try:
            connection.send(Submit(stream.handle, request, stream.slot))
        except FrameTooLarge as error:
            raise BodyTooLarge(f"The request is too large for the engine: {error}.") from error
        except UnicodeEncodeError as error:
            raise BadRequest("The text holds half a surrogate pair, which is no character.") from error
        stream.submissions += 1
        del self._waiting[stream.handle]
        self._submitted[stream.handle] = stream

    def _forget(self, stream: _Stream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
        if self._waiting.pop(stream.handle, None) is not None:
            self._counted(stream, None)
        elif self._submitted.pop(stream.handle, None) is not None and self._connection is not None:
            self._left[stream.handle] = stream
            self._connection.send(Cancel(stream.handle))

    def _counted(self, stream: _Stream, report: Report | None, *, cut: bool = False) -> None:
        """No engine counts for the request any more."""
        slot, stream.slot = stream.slot, None
        if self._meters is not None and slot is not None and slot >= 0:
            self._meters.ended(stream.request.id, report, stream.seen if cut else None)

    async def _await_counts(self, streams: list[_Stream], pid: int) -> None:
        """After a lost connection: a worker that lives has cancelled these, and counts until that takes hold."""
        assert self._meters is not None
        for stream in streams:
            while not self._meters.has_ended(stream.request.id) and _lives(pid):  # noqa: ASYNC110  (neither tells us)
                await asyncio.sleep(ADRIFT)
            self._counted(stream, None, cut=True)

    def _at_deadline(self, stream: _Stream) -> None:
        if stream.handle in self._waiting:
            if stream.request.timeout is None:
                stream.fail(EngineUnavailable(f"No engine was ready within {self._patience:g} s.", retry_after=5))
            else:
                stream.fail(DeadlineExceeded(f"The engine was not ready within the request's {stream.request.timeout:g} s."))
        elif stream.handle in self._submitted and stream.request.timeout is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < stream.deadline + GRACE:
                stream.timer = loop.call_at(stream.deadline + GRACE, self._at_deadline, stream)
            else:
                stream.fail(DeadlineExceeded(f"The request took longer than its {stream.request.timeout:g} s."))

    # The connection

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.01
        while True:
            ended = asyncio.Event()
            connections: list[FrameConnection[FromWorker]] = []

            def received(message: FromWorker, connections: list[FrameConnection[FromWorker]] = connections) -> None:
                self._received(message, connections[0])

            try:
                await loop.create_unix_connection(
                    lambda received=received, ended=ended, connections=connections: FrameConnection[FromWorker](  # type: ignore[misc]
                        FromWorker, received, ended.set, made=connections.append
                    ),
                    self._path,
                )
            except OSError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)
                continue
            try:
                await ended.wait()
            except asyncio.CancelledError:
                connections[0].close()
                raise
            finally:
                self._ended(connections[0])
            pause = 0.01

    def _received(self, message: FromWorker, connection: FrameConnection[FromWorker]) -> None:
        if isinstance(message, Step):
            submitted = self._submitted
            for handle, events in message.batches:
                stream = submitted.get(handle)
                if stream is None:
                    # The report was under way when it was cancelled, and the worker found nothing to cancel.
                    if type(report := events[-1]) is Report and (left := self._left.pop(handle, None)) is not None:
                        self._counted(left, report, cut=True)
                    continue
                stream.began = True
                if stream.pending:
                    stream.pending += events
                else:
                    stream.pending = events
                if type(report := events[-1]) is Report:
                    stream.done = True
                    del submitted[handle]
                    self._counted(stream, report)
                stream.wake()
        elif isinstance(message, Failed):
            stream = self._submitted.pop(message.handle, None)
            if stream is not None and message.code == EngineDied.code and not stream.began:
                self._after_death(stream)
            elif stream is not None:
                self._counted(stream, None)
                stream.fail(revive(message.code, message.message, message.param, message.retry_after))
            elif (left := self._left.pop(message.handle, None)) is not None:
                self._counted(left, None, cut=True)
        elif isinstance(message, Ended):
            left = self._left.pop(message.handle, None)
            if left is not None:
                self._counted(left, message.report, cut=True)
        elif isinstance(message, Hello):
            self._hello(message, connection)
        elif isinstance(message, Stats):
            self._stats = message.stats
            self._wake_stats_waiters()

    def _hello(self, hello: Hello, connection: FrameConnection[FromWorker]) -> None:
        self._card = hello.card
        self._worker_pid = hello.pid
        self._connection = connection
        if self._meters is not None:
            connection.send(Counting(self._meters.path))
        self._unavailable = None
        self._ready.set()
        for stream in [*self._waiting.values()]:
            if stream.error is None:
                try:
                    self._submit(stream, connection, waited=True)
                except HeadraceError as error:
                    stream.fail(error)
        if self._on_ready is not None:
            self._on_ready(hello.card)

    def _ended(self, connection: FrameConnection[FromWorker]) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        self._ready.clear()
        self._stats = EngineStats()
        self._wake_stats_waiters()
        submitted, self._submitted = self._submitted, {}
        if submitted:
            structlog.get_logger("headrace.engines").warning("engine lost", requests=len(submitted))
        lost, self._left = [*self._left.values()], {}
        for stream in submitted.values():
            self._after_death(stream)
            if stream.handle not in self._waiting:
                lost.append(stream)
        if self._meters is not None and lost:
            task = asyncio.create_task(self._await_counts(lost, self._worker_pid))
            self._adrift.add(task)
            task.add_done_callback(self._adrift.discard)
        if self._on_lost is not None:
            self._on_lost()

    def _after_death(self, stream: _Stream) -> None:
        """What becomes of a request whose worker died: nothing was sent, so nothing is lost by starting it again; else it ends."""
        if stream.began:
            stream.fail(EngineDied("The engine's process ended while it answered this request; it is being started again.", retry_after=1))
        elif stream.submissions >= MAX_SUBMISSIONS:
            stream.fail(EngineDied(f"The engine's process ended {stream.submissions} times while this request waited for its first token."))
        elif (refusal := self._closed or self._unavailable) is not None:
            stream.fail(refusal)
        else:
            if self._meters is not None:
                self._meters.restart(stream.request.id, 0)
            self._waiting[stream.handle] = stream

    # Figures

    def stats(self) -> EngineStats:
        """As of the last `refresh`."""
        return self._stats

    async def refresh(self, timeout: float = 1.0) -> EngineStats:
        """Ask the worker for its figures; the last known ones if it doesn't say in time."""
        if self._connection is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._stats_waiters.append(waiter)
            self._connection.send(StatsRequest())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiter, timeout)
        return self._stats

    def _wake_stats_waiters(self) -> None:
        waiters, self._stats_waiters = self._stats_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
