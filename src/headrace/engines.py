"""The client of an engine worker: `ports.Engine` over the worker's socket.

The connection is made again whenever it ends. Requests don't notice that: they wait, within their deadlines, and are submitted to the
next worker, those under way with the tokens that arrived, to go on from there. Only an engine that can't do that, as one that is
elsewhere, loses what it has begun. Requests that an engine dies of are found out: one that was in the step that it died of, and had got
nothing from it, is a suspect and runs alone the next time; if engines go on dying then, it is convicted. What becomes of a request whose
worker died is decided in one place, `EngineClient._after_death`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable

import msgspec
import structlog

from headrace.engine.frames import (
    Cancel,
    Counting,
    Crowded,
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
from headrace.engine.step_notes import LastStep, notes_path, read_last_step
from headrace.engine_deaths import Deaths
from headrace.engine_streams import MAX_SUBMISSIONS, EngineStream, Reading
from headrace.errors import BadRequest, BodyTooLarge, DeadlineExceeded, EngineDied, EngineUnavailable, HeadraceError, ModelNotLoaded, revive
from headrace.ports import Meters
from headrace.quarantine import Quarantine, convicted, fingerprint
from headrace.types import EngineCard, EngineStats, GenerateRequest, Report, Resume
from headrace.waiting import Bounds, Newcomer, Queue, with_newcomer

CROWD_FRESH = 0.25
"""Seconds for which a worker's word on its crowded queue counts."""
HELD = 16 * 1024
"""Bytes of a stream's events that wait for whoever reads them before it is found to be slow."""
HELD_WITHOUT_REST = 64 * 1024
"""Likewise, before a stream is ended that an engine can't let rest."""
SLOW = 0.02
"""Seconds in which a reader that is only busy has read."""
GRACE = 1.0
"""Seconds after a deadline in which the worker may still end a request itself, and say where the time went."""
ADRIFT = 0.02
"""Seconds between looks at whether a worker that was lost still counts."""
IDLE = 0.2
"""Seconds without requests after which that is said; less often than every pause between two of them."""


class EngineClient:
    """An engine that lives in a worker process, behind the unix socket at `path`.

    `patience`: seconds that a request without a timeout waits for a worker. `on_ready` is called whenever a worker
    said what it is, `on_lost` whenever a connection to a ready worker ended. `meters` is where requests are counted that are on a bill.
    A request that killed workers, running alone, is refused for `quarantine_seconds`; `on_quarantine` hears its fingerprint and the
    Unix time until when, to tell the other API processes, whose clients learn it by `quarantine`.
    """

    def __init__(
        self,
        path: str,
        *,
        patience: float = 600.0,
        on_ready: Callable[[EngineCard], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        meters: Meters | None = None,
        quarantine_seconds: float = 3600.0,
        on_quarantine: Callable[[bytes, float], None] | None = None,
        on_wanted: Callable[[], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._patience = patience
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._meters = meters
        self._quarantine_seconds = quarantine_seconds
        self._on_quarantine = on_quarantine
        self._on_wanted = on_wanted
        self._on_idle = on_idle
        self._in_use = False
        """It was said that there are requests, and not yet that there are none any more."""
        self._paused: list[Callable[[], None]] | None = None
        """Who is to hear that no worker has anything of ours; None while requests are submitted."""
        self.elsewhere: Callable[[EngineClient], EngineClient | None] = lambda client: None
        """Another client whose worker can go on with the requests of this one's, which died."""
        self.not_loaded = ""
        """Why there is no worker, where the model isn't loaded for want of room or is being loaded; empty where it is another reason."""
        self.quarantined = Quarantine()
        self.resumed = 0
        """Requests that went on after a worker's death, each as often as it did."""
        self._left: dict[int, EngineStream] = {}
        """Cancelled, and the worker has not said yet that it is done with them."""
        self._adrift: set[asyncio.Task[None]] = set()
        self._worker_pid = 0
        self._handles = itertools.count(1)
        self._submitted: dict[int, EngineStream] = {}
        self._waiting: dict[int, EngineStream] = {}
        self._resting: set[EngineStream] = set()
        """They wait for their readers, and no worker has them."""
        self._connection: FrameConnection[FromWorker] | None = None
        """Set from a worker's hello to the end of its connection."""
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._card: EngineCard | None = None
        self._stats = EngineStats()
        self._crowded: Crowded | None = None
        self._crowded_at = 0.0
        self._deaths = Deaths()
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
    def worker_pid(self) -> int:
        """Of the worker that said hello last."""
        return self._worker_pid

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

    def expect(self, pid: int) -> None:
        """That worker serves. One that hangs in the kernel may hold on to its connection for long after it was replaced."""
        if self._connection is not None and self._worker_pid != pid:
            self._connection.abort()

    def quarantine(self, print_: bytes, until: float) -> None:
        """Refuse requests with this fingerprint until that Unix time, those that wait for a worker, too."""
        if self.quarantined.add(print_, until):
            for stream in [*self._waiting.values()]:
                refusal = self.quarantined.refusal(stream.request)
                if refusal is not None:
                    stream.fail(refusal)

    def fail_waiting(self, error: HeadraceError) -> None:
        """End the requests that wait for a worker; new ones may still come."""
        for stream in [*self._waiting.values()]:
            stream.fail(error)

    @property
    def in_use(self) -> bool:
        """Whether there are requests, waiting, under way or at rest."""
        return bool(self._waiting or self._submitted or self._resting or self._left)

    def pause(self, told: Callable[[], None]) -> None:
        """Hand no request to the worker from now on: they wait. `told` is called once the worker has nothing of ours any more."""
        self._paused = [*(self._paused or []), told]
        self._in_use = False
        self._tell_if_empty()

    def unpause(self) -> None:
        """Hand requests to the worker again, those that wait first."""
        self._paused = None
        if self._connection is not None:
            self._submit_waiting(self._connection)
        elif self._waiting and self._on_wanted is not None:
            self._on_wanted()

    def end_all(self, error: HeadraceError) -> None:
        """End every request with `error`, and refuse new ones with it."""
        self._closed = error
        for stream in [*self._waiting.values(), *self._submitted.values(), *self._resting]:
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

    def generate(self, request: GenerateRequest) -> Reading:
        """Events of one request, which is submitted when they are first read. Closing the iterator cancels it in the worker.

        Reading raises what the engine raised; `EngineDied` if the worker died under way and another can't go on; `RequestQuarantined` if
        workers die of it; `EngineUnavailable` or `DeadlineExceeded` if none was there in time; `BodyTooLarge` if the request doesn't fit
        a frame.
        """
        return Reading(self, request)

    def open(self, request: GenerateRequest) -> EngineStream:
        """Begin with a request; who reads its events does, by `generate`."""
        refusal = self._closed or self._unavailable or self.quarantined.refusal(request)
        if refusal is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._patience if request.timeout is None else request.timeout)
        stream = EngineStream(request, self, next(self._handles), deadline)
        stream.timer = loop.call_at(deadline, stream.time_out)
        self._waiting[stream.handle] = stream
        connection = self._open_connection
        if self._on_wanted is not None and (connection is None or not self._in_use):
            self._in_use = True
            self._on_wanted()
        if connection is not None:
            try:
                self._submit(stream, connection)
            except BaseException:
                self.forget(stream)
                raise
        return stream

    @property
    def _open_connection(self) -> FrameConnection[FromWorker] | None:
        """To the worker, if it may be given requests."""
        return None if self._paused is not None else self._connection

    def _submit(self, stream: EngineStream, connection: FrameConnection[FromWorker], waited: bool = False) -> None:
        request = stream.request
        now = asyncio.get_running_loop().time()
        if waited and request.timeout is not None:
            request = msgspec.structs.replace(request, timeout=max(0.001, stream.deadline - now))
        if stream.began:
            request = self._resumed(stream, request)
        stream.rest = "no"
        stream.got_on = False
        stream.submitted_at = now
        stream.asked_at = stream.asked_at or now
        if stream.slot is None:
            stream.slot = -1 if self._meters is None else self._meters.begin(request.id)
        if stream.submissions and self._meters is not None:
            # Not before: where no engine goes on, the bill is what the last one made.
            cached = self._meters.restart(request.id, stream.tokens)
            stream.cached = stream.cached or cached
        try:
            connection.send(Submit(stream.handle, request, stream.slot, stream.suspect, stream.submissions > 0))
        except FrameTooLarge as error:
            raise BodyTooLarge(f"The request is too large for the engine: {error}.") from error
        except UnicodeEncodeError as error:
            raise BadRequest("The text holds half a surrogate pair, which is no character.") from error
        stream.submissions += 1
        del self._waiting[stream.handle]
        self._submitted[stream.handle] = stream

    def _resumed(self, stream: EngineStream, request: GenerateRequest) -> GenerateRequest:
        """The request as it goes on. Raises `EngineDied` where this worker can't do that."""
        assert self._card is not None
        if "resume" not in self._card.capabilities or self._card.fingerprint != stream.model:
            raise EngineDied("The engine's process ended while it answered this request, and another model has taken its place.")
        self.resumed += 1
        said = tuple(tuple(tokens) for tokens in stream.generated)
        return msgspec.structs.replace(request, resume=Resume(said, tuple(stream.ended), stream.scored))

    def forget(self, stream: EngineStream) -> None:
        """Its reader wants no more of it, or has all."""
        if stream.timer is not None:
            stream.timer.cancel()
        if stream in self._resting:
            self._resting.discard(stream)
            self._counted(stream, None, cut=True)
        elif self._waiting.pop(stream.handle, None) is not None:
            self._counted(stream, None)
        elif self._submitted.pop(stream.handle, None) is not None and self._connection is not None:
            self._left[stream.handle] = stream
            self._connection.send(Cancel(stream.handle))
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        """Those who wait for it hear that the worker has nothing of ours; and, a moment later, who loads models that nobody asks."""
        if self._paused and not self._submitted and not self._left:
            told, self._paused = self._paused, []
            for each in told:
                each()
        if self._on_idle is not None and self._in_use and not self.in_use:
            asyncio.get_running_loop().call_later(IDLE, self._maybe_idle)

    def _maybe_idle(self) -> None:
        if self._on_idle is not None and self._in_use and not self.in_use:
            self._in_use = False
            self._on_idle()

    def _counted(self, stream: EngineStream, report: Report | None, *, cut: bool = False) -> None:
        """No engine counts for the request any more."""
        slot, stream.slot = stream.slot, None
        if self._meters is not None and slot is not None and slot >= 0:
            self._meters.ended(stream.request.id, report, stream.seen if cut else None)

    async def _await_counts(self, streams: list[EngineStream], pid: int) -> None:
        """After a lost connection: a worker that lives has cancelled these, and counts until that takes hold."""
        assert self._meters is not None
        for stream in streams:
            while not self._meters.has_ended(stream.request.id) and _lives(pid):  # noqa: ASYNC110  (neither tells us)
                await asyncio.sleep(ADRIFT)
            self._counted(stream, None, cut=True)

    def at_deadline(self, stream: EngineStream) -> None:
        """Its time is over; where its worker has it, that gets a moment to say so itself."""
        if stream.handle in self._waiting:
            if self.not_loaded:
                stream.fail(ModelNotLoaded(f"The model isn't in memory: {self.not_loaded}.", retry_after=5))
            elif stream.request.timeout is None:
                stream.fail(EngineUnavailable(f"No engine was ready within {self._patience:g} s.", retry_after=5))
            else:
                stream.fail(DeadlineExceeded(f"The engine was not ready within the request's {stream.request.timeout:g} s."))
        elif stream.rest == "now":
            if stream.request.timeout is not None:
                why = "The answer was read so slowly that the request took longer"
                stream.fail(DeadlineExceeded(f"{why} than its {stream.request.timeout:g} s."))
        elif stream.handle in self._submitted and stream.request.timeout is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < stream.deadline + GRACE:
                stream.timer = loop.call_at(stream.deadline + GRACE, stream.time_out)
            else:
                stream.fail(DeadlineExceeded(f"The request took longer than its {stream.request.timeout:g} s."))

    # Readers that are slow

    def _is_behind(self, stream: EngineStream, connection: FrameConnection[FromWorker]) -> None:
        """More waits than is held for anybody: unless the reader was only busy, let the stream rest, out of the engine's way."""
        assert self._card is not None
        now = asyncio.get_running_loop().time()
        stream.merge()
        stream.behind_since = stream.behind_since or now
        if stream.rest != "no" or now - stream.behind_since < SLOW or stream.all_said:
            return
        if "resume" in self._card.capabilities:
            stream.rest = "coming"
            connection.send(Cancel(stream.handle))
        elif stream.held > HELD_WITHOUT_REST:
            stream.fail(EngineUnavailable("The answer was not read fast enough, and this engine can't wait."))

    def _rests(self, stream: EngineStream, report: Report | None) -> None:
        """The worker has let go of it, and made no more than has arrived, or nobody has seen."""
        assert self._card is not None
        if stream.all_said:
            self._complete(stream)
            return
        stream.rest = "now"
        self._resting.add(stream)
        stream.model = stream.model or self._card.fingerprint
        stream.cached = stream.cached or (0 if report is None else report.cached_tokens)
        if self._meters is not None:
            self._meters.restart(stream.request.id, stream.tokens)
        if not stream.pending:
            self.was_read(stream)

    def was_read(self, stream: EngineStream) -> None:
        """A portion was taken; a stream that rests goes on once all were."""
        stream.behind_since = 0.0
        if stream.pending:
            return
        stream.held = 0
        if stream.rest != "now":
            return
        stream.rest = "no"
        self._resting.discard(stream)
        stream.handle = next(self._handles)
        self._waiting[stream.handle] = stream
        refusal = self._closed or self._unavailable
        if refusal is not None:
            stream.fail(refusal)
        elif self._open_connection is not None:
            try:
                self._submit(stream, self._open_connection, waited=True)
            except HeadraceError as error:
                stream.fail(error)
        elif self._on_wanted is not None:
            self._on_wanted()

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
                    if type(last := events[-1]) is Report and (left := self._left.pop(handle, None)) is not None:
                        self._counted(left, last, cut=True)
                        self._tell_if_empty()
                    continue
                stream.take_note(events)
                report = last if type(last := events[-1]) is Report else None
                if report is not None and stream.submissions > 1:
                    report = events[-1] = stream.whole(report)
                if stream.pending:
                    stream.arrived(events)
                    if stream.held > HELD:
                        self._is_behind(stream, connection)
                elif report is None and stream.hand_over(events):
                    continue
                else:
                    stream.pending = events
                if report is not None:
                    stream.done = True
                    del submitted[handle]
                    self._counted(stream, report)
                stream.wake()
        elif isinstance(message, Failed):
            self._failed(message)
        elif isinstance(message, Ended):
            left = self._left.pop(message.handle, None)
            if left is not None:
                self._counted(left, message.report, cut=True)
            elif (resting := self._submitted.pop(message.handle, None)) is not None:
                self._rests(resting, message.report)
            self._tell_if_empty()
        elif isinstance(message, Hello):
            self._hello(message, connection)
        elif isinstance(message, Crowded):
            self._crowded = message
            self._crowded_at = asyncio.get_running_loop().time()
        elif isinstance(message, Stats):
            self._stats = message.stats
            self._wake_stats_waiters()

    def _failed(self, message: Failed) -> None:
        # Made before the request is forgotten: nobody else would end it.
        error = revive(message.code, message.message, message.param, message.retry_after)
        stream = self._submitted.pop(message.handle, None)
        if stream is not None and isinstance(error, EngineDied):
            self._after_death(stream, self._last_step())
            if stream.handle not in self._waiting and not stream.done:
                self._counted(stream, None)
        elif stream is not None:
            self._counted(stream, None)
            stream.fail(error)
        elif (left := self._left.pop(message.handle, None)) is not None:
            self._counted(left, None, cut=True)
        self._tell_if_empty()
        if self._waiting and self._connection is None:
            self.move_on()

    def _hello(self, hello: Hello, connection: FrameConnection[FromWorker]) -> None:
        self._card = hello.card
        self._worker_pid = hello.pid
        self._connection = connection
        if self._meters is not None:
            connection.send(Counting(self._meters.path))
        self._unavailable = None
        self._ready.set()
        if self._paused is None:
            self._submit_waiting(connection)
        if self._on_ready is not None:
            self._on_ready(hello.card)

    def _submit_waiting(self, connection: FrameConnection[FromWorker]) -> None:
        # Suspects first: whom the worker has begun with must make room for them again.
        for stream in sorted(self._waiting.values(), key=lambda stream: stream.turn):
            if stream.error is None:
                try:
                    self._submit(stream, connection, waited=True)
                except HeadraceError as error:
                    stream.fail(error)

    def move_on(self) -> None:
        """What waits here for a worker that died goes on elsewhere, where that can be."""
        other = self.elsewhere(self) if self._waiting else None
        if other is None:
            if self._waiting and self._on_wanted is not None and self._connection is None:
                self._on_wanted()
            return
        if other._on_wanted is not None and not other._in_use:
            other._in_use = True
            other._on_wanted()
        moved, self._waiting = self._waiting, {}
        for stream in sorted(moved.values(), key=lambda stream: stream.turn):
            stream.home = other
            stream.handle = next(other._handles)
            other._waiting[stream.handle] = stream
            connection = other._open_connection
            if stream.error is None and connection is not None:
                try:
                    other._submit(stream, connection, waited=True)
                except HeadraceError as error:
                    stream.fail(error)

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
        last = self._last_step() if submitted else None
        if last is not None and len(last.members) == sum(last.took_part(stream.request.id) for stream in submitted.values()):
            # Else another API process has suspects, too, and doesn't tell what becomes of them.
            self._deaths.died([stream for stream in submitted.values() if not stream.got_on])
        for stream in submitted.values():
            self._after_death(stream, last)
            if stream.handle not in self._waiting and not stream.done:
                lost.append(stream)
        if self._meters is not None and lost:
            task = asyncio.create_task(self._await_counts(lost, self._worker_pid))
            self._adrift.add(task)
            task.add_done_callback(self._adrift.discard)
        if self._on_lost is not None:
            self._on_lost()
        self.move_on()
        self._tell_if_empty()

    def _last_step(self) -> LastStep | None:
        return read_last_step(notes_path(self._path, self._worker_pid))

    def _after_death(self, stream: EngineStream, last: LastStep | None) -> None:
        """What becomes of a request whose worker died, and had noted `last` of its last step."""
        assert self._card is not None
        resumes = "resume" in self._card.capabilities
        if stream.all_said:
            self._complete(stream)
            return
        stream.outlived(last, from_outside=self._deaths.from_outside)
        if stream.began and not resumes:
            stream.fail(EngineDied("The engine's process ended while it answered this request; it is being started again.", retry_after=1))
        elif stream.fruitless >= MAX_SUBMISSIONS and (last is None or not resumes):
            stream.fail(EngineDied(f"The engine's process ended {stream.fruitless} times while this request waited for it."))
        elif stream.lone_deaths >= self._deaths.to_convict:
            self._convict(stream)
        elif (refusal := self._closed or self._unavailable or self.quarantined.refusal(stream.request)) is not None:
            stream.fail(refusal)
        else:
            if stream.got_on and not stream.model:
                stream.model = self._card.fingerprint
            self._waiting[stream.handle] = stream

    def _complete(self, stream: EngineStream) -> None:
        """All was said but the report."""
        if self._meters is not None:
            stream.cached = stream.cached or self._meters.restart(stream.request.id, stream.tokens)
        report = Report(len(stream.request.prompt), stream.cached, stream.tokens, 0.0, 0.0, 0.0)
        stream.pending = [*stream.pending, report]
        stream.done = True
        self._counted(stream, report)
        stream.wake()

    def _convict(self, stream: EngineStream) -> None:
        seconds = self._quarantine_seconds
        print_, until = fingerprint(stream.request), time.time() + seconds
        structlog.get_logger("headrace.engines").error(
            "request quarantined", request_id=stream.request.id, fingerprint=print_.hex(), seconds=seconds
        )
        stream.fail(convicted(seconds))
        self.quarantine(print_, until)
        if self._on_quarantine is not None:
            self._on_quarantine(print_, until)

    # Figures

    def crowd(self) -> tuple[Queue, Bounds] | None:
        """The worker's queue, while it refuses requests and said so within the last `CROWD_FRESH` seconds."""
        said = self._crowded
        if said is None or self._connection is None:
            return None
        if asyncio.get_running_loop().time() - self._crowded_at > CROWD_FRESH:
            self._crowded = None
            return None
        return said.queue, said.bounds

    def let_in(self, newcomer: Newcomer) -> None:
        """A request goes there: until the worker says how its queue is now, others are behind that one."""
        said = self._crowded
        if said is not None:
            self._crowded = Crowded(with_newcomer(said.queue, said.bounds, newcomer), said.bounds)

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
