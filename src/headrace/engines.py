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
from typing import Literal

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
from headrace.errors import BadRequest, BodyTooLarge, DeadlineExceeded, EngineDied, EngineUnavailable, HeadraceError, ModelNotLoaded, revive
from headrace.ports import Meters, TakesBatch
from headrace.quarantine import Quarantine, convicted, fingerprint
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, PromptScores, Report, Resume
from headrace.waiting import Bounds, Queue

CROWD_FRESH = 0.25
"""Seconds for which a worker's word on its crowded queue counts."""
HELD = 16 * 1024
"""Bytes of a stream's events, by `_weight`, that wait for whoever reads them before it is found to be slow."""
HELD_WITHOUT_REST = 64 * 1024
"""Likewise, before a stream is ended that an engine can't let rest."""
PORTION = 4 * 1024
"""Bytes of a stream's events, likewise, that a slow reader gets at once."""
SLOW = 0.02
"""Seconds in which a reader that is only busy has read."""
GRACE = 1.0
"""Seconds after a deadline in which the worker may still end a request itself, and say where the time went."""
ADRIFT = 0.02
"""Seconds between looks at whether a worker that was lost still counts."""
IDLE = 0.2
"""Seconds without requests after which that is said; less often than every pause between two of them."""
MAX_SUBMISSIONS = 3
"""A request that saw this many workers die without getting on may be the reason, whatever was noted of their last steps: a suspect. Of
engines that nothing is noted of, it is ended."""
LONE_DEATHS = 2
"""Workers in a row that died while a suspect had them to itself, upon which it is convicted. One may have been killed by somebody else."""


class _Stream:
    """A request of this API process, from `generate` to its end."""

    __slots__ = (
        "asked_at",
        "began",
        "behind_since",
        "cached",
        "deadline",
        "done",
        "ended",
        "error",
        "fruitless",
        "generated",
        "got_on",
        "handle",
        "held",
        "home",
        "lone_deaths",
        "model",
        "pending",
        "reached",
        "request",
        "rest",
        "scored",
        "seen",
        "slot",
        "stopped",
        "submissions",
        "submitted_at",
        "suspect",
        "take",
        "timer",
        "waiter",
    )

    def __init__(self, request: GenerateRequest, home: EngineClient, now: float, patience: float) -> None:
        self.request = request
        self.home = home
        """The client that has it; another one's where its worker died and a replica went on with it."""
        self.handle = next(home.handles)
        self.deadline = now + (patience if request.timeout is None else request.timeout)
        self.pending: list[Event] = []
        """Arrived and not read."""
        self.held = 0
        """Their weight, as far as they came while others were waiting to be read."""
        self.behind_since = 0.0
        """When there were first too many of them; 0 is not."""
        self.rest: Literal["no", "coming", "now"] = "no"
        """Whether it waits for its reader: `coming` until its worker has let go of it."""
        self.began = False
        """True once a worker has sent anything for it."""
        self.generated: tuple[list[int], ...] = tuple([[] for _ in range(request.sampling.n)])
        """The tokens of each choice that have arrived: what another worker goes on from."""
        self.ended: set[int] = set()
        """Choices."""
        self.scored = False
        """The prompt's scores have arrived."""
        self.got_on = False
        """The worker at hand has sent something for it."""
        self.fruitless = 0
        """Workers in a row that died without having sent anything for it."""
        self.lone_deaths = 0
        """Of these workers, those that it had to itself and that got no further with it than the one before."""
        self.reached: int | None = None
        """Tokens of it that would have been computed after the step that the last of them died of."""
        self.suspect = False
        """A worker may have died of it: the next one runs it alone."""
        self.model = ""
        """Fingerprint of the engine that has begun it."""
        self.cached = 0
        """Tokens of its prompt that the first worker had cached."""
        self.submissions = 0
        self.asked_at = 0.0
        """When it was first submitted."""
        self.submitted_at = 0.0
        self.seen = 0
        """Tokens that were read, of a request that is counted."""
        self.slot: int | None = None
        """Where it is counted, from the first submission to the last engine's end; -1 for a request that is on no bill."""
        self.done = False
        self.error: Exception | None = None
        self.take: TakesBatch | None = None
        """Asked first while the reader waits."""
        self.stopped = False
        """`take` wants no more of it."""
        self.waiter: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def tokens(self) -> int:
        """That have arrived, over all choices."""
        return sum(map(len, self.generated))

    def take_note(self, events: list[Event]) -> None:
        """Remember what has arrived."""
        self.began = self.got_on = True
        generated = self.generated
        for event in events:
            if type(event) is Delta:
                generated[event.choice].extend(event.tokens)
                if event.finish is not None:
                    self.ended.add(event.choice)
            elif type(event) is PromptScores:
                self.scored = True

    def was_seen(self, events: list[Event]) -> None:
        """Its reader has them, if it is on a bill."""
        if self.slot is not None and self.slot >= 0:
            for event in events:
                if type(event) is Delta:
                    self.seen += len(event.tokens)

    def whole(self, report: Report) -> Report:
        """The last worker's report with what was before: the time until it got the request, and what it can't know."""
        before = (self.submitted_at - self.asked_at) * 1e3
        began = self.model != ""
        return msgspec.structs.replace(
            report,
            cached_tokens=self.cached if began else report.cached_tokens,
            queue_ms=report.queue_ms + (0.0 if began else before),
            decode_ms=report.decode_ms + (before if began else 0.0),
        )

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


class Reading:
    """Event batches of one request. `ports.HandsOver`, too."""

    __slots__ = ("_client", "_over", "_request", "_stream")

    def __init__(self, client: EngineClient, request: GenerateRequest) -> None:
        self._client = client
        self._request = request
        self._stream: _Stream | None = None
        self._over = False

    def __aiter__(self) -> Reading:
        return self

    async def __anext__(self) -> list[Event]:
        if self._over:
            raise StopAsyncIteration
        stream = self._stream
        try:
            if stream is None:
                stream = self._stream = self._client._open(self._request)
            while True:
                if stream.pending:
                    return _read(stream)
                if stream.done:
                    raise StopAsyncIteration
                if stream.error is not None:
                    raise stream.error
                stream.waiter = asyncio.get_running_loop().create_future()
                await stream.waiter
                if stream.stopped:
                    raise stream.error or StopAsyncIteration
        except BaseException:
            self._close()
            raise

    def hand_to(self, take: TakesBatch) -> None:
        if self._stream is not None:
            self._stream.take = take

    def stop(self, error: Exception | None = None) -> None:
        stream = self._stream
        if stream is not None:
            stream.take = None
            stream.stopped = True
            stream.error = error
            stream.wake()

    async def aclose(self) -> None:
        """Hang up. Idempotent."""
        self._close()

    def _close(self) -> None:
        if not self._over:
            self._over = True
            if self._stream is not None:
                self._stream.take = None
                self._stream.home._forget(self._stream)


def _read(stream: _Stream) -> list[Event]:
    """What has arrived, or as much of it as a slow reader gets at once."""
    batch = stream.pending
    if stream.held:
        batch = _portion(batch)
        stream.pending = stream.pending[len(batch) :]
    else:
        stream.pending = []
    stream.home._was_read(stream)
    stream.was_seen(batch)
    return batch


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
        self._left: dict[int, _Stream] = {}
        """Cancelled, and the worker has not said yet that it is done with them."""
        self._adrift: set[asyncio.Task[None]] = set()
        self._worker_pid = 0
        self.handles = itertools.count(1)
        self._submitted: dict[int, _Stream] = {}
        self._waiting: dict[int, _Stream] = {}
        self._resting: set[_Stream] = set()
        """They wait for their readers, and no worker has them."""
        self._connection: FrameConnection[FromWorker] | None = None
        """Set from a worker's hello to the end of its connection."""
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._card: EngineCard | None = None
        self._stats = EngineStats()
        self._crowded: Crowded | None = None
        self._crowded_at = 0.0
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

    def _open(self, request: GenerateRequest) -> _Stream:
        refusal = self._closed or self._unavailable or self.quarantined.refusal(request)
        if refusal is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        stream = _Stream(request, self, loop.time(), self._patience)
        stream.timer = loop.call_at(stream.deadline, _at_deadline, stream)
        self._waiting[stream.handle] = stream
        connection = self._open_connection
        if self._on_wanted is not None and (connection is None or not self._in_use):
            self._in_use = True
            self._on_wanted()
        if connection is not None:
            try:
                self._submit(stream, connection)
            except BaseException:
                self._forget(stream)
                raise
        return stream

    @property
    def _open_connection(self) -> FrameConnection[FromWorker] | None:
        """To the worker, if it may be given requests."""
        return None if self._paused is not None else self._connection

    def _submit(self, stream: _Stream, connection: FrameConnection[FromWorker], waited: bool = False) -> None:
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

    def _resumed(self, stream: _Stream, request: GenerateRequest) -> GenerateRequest:
        """The request as it goes on. Raises `EngineDied` where this worker can't do that."""
        assert self._card is not None
        if "resume" not in self._card.capabilities or self._card.fingerprint != stream.model:
            raise EngineDied("The engine's process ended while it answered this request, and another model has taken its place.")
        self.resumed += 1
        said = tuple(tuple(tokens) for tokens in stream.generated)
        return msgspec.structs.replace(request, resume=Resume(said, tuple(stream.ended), stream.scored))

    def _forget(self, stream: _Stream) -> None:
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
                stream.timer = loop.call_at(stream.deadline + GRACE, _at_deadline, stream)
            else:
                stream.fail(DeadlineExceeded(f"The request took longer than its {stream.request.timeout:g} s."))

    # Readers that are slow

    def _is_behind(self, stream: _Stream, connection: FrameConnection[FromWorker]) -> None:
        """More waits than is held for anybody: unless the reader was only busy, let the stream rest, out of the engine's way."""
        assert self._card is not None
        now = asyncio.get_running_loop().time()
        stream.pending = _merged(stream.pending)
        stream.held = sum(map(_weight, stream.pending))
        stream.behind_since = stream.behind_since or now
        if stream.rest != "no" or now - stream.behind_since < SLOW or len(stream.ended) == len(stream.generated):
            return
        if "resume" in self._card.capabilities:
            stream.rest = "coming"
            connection.send(Cancel(stream.handle))
        elif stream.held > HELD_WITHOUT_REST:
            stream.fail(EngineUnavailable("The answer was not read fast enough, and this engine can't wait."))

    def _rests(self, stream: _Stream, report: Report | None) -> None:
        """The worker has let go of it, and made no more than has arrived, or nobody has seen."""
        assert self._card is not None
        if len(stream.ended) == len(stream.generated):
            self._complete(stream)
            return
        stream.rest = "now"
        self._resting.add(stream)
        stream.model = stream.model or self._card.fingerprint
        stream.cached = stream.cached or (0 if report is None else report.cached_tokens)
        if self._meters is not None:
            self._meters.restart(stream.request.id, stream.tokens)
        if not stream.pending:
            self._was_read(stream)

    def _was_read(self, stream: _Stream) -> None:
        """A portion was taken; a stream that rests goes on once all were."""
        stream.behind_since = 0.0
        if stream.pending:
            return
        stream.held = 0
        if stream.rest != "now":
            return
        stream.rest = "no"
        self._resting.discard(stream)
        stream.handle = next(self.handles)
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
                    stream.pending += events
                    stream.held += sum(map(_weight, events))
                    if stream.held > HELD:
                        self._is_behind(stream, connection)
                elif report is None and stream.take is not None and stream.waiter is not None and _handed_over(stream, stream.take, events):
                    continue
                else:
                    stream.pending = events
                if report is not None:
                    stream.done = True
                    del submitted[handle]
                    self._counted(stream, report)
                stream.wake()
        elif isinstance(message, Failed):
            stream = self._submitted.pop(message.handle, None)
            if stream is not None and message.code == EngineDied.code:
                self._after_death(stream, self._last_step())
                if stream.handle not in self._waiting and not stream.done:
                    self._counted(stream, None)
            elif stream is not None:
                self._counted(stream, None)
                stream.fail(revive(message.code, message.message, message.param, message.retry_after))
            elif (left := self._left.pop(message.handle, None)) is not None:
                self._counted(left, None, cut=True)
            self._tell_if_empty()
            if self._waiting and self._connection is None:
                self.move_on()
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
        for stream in sorted(self._waiting.values(), key=_turn):
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
        for stream in sorted(moved.values(), key=_turn):
            stream.home = other
            stream.handle = next(other.handles)
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

    def _after_death(self, stream: _Stream, last: LastStep | None) -> None:
        """What becomes of a request whose worker died, and had noted `last` of its last step."""
        assert self._card is not None
        resumes = "resume" in self._card.capabilities
        if len(stream.ended) == len(stream.generated):
            self._complete(stream)
            return
        further = False
        if stream.got_on:
            stream.reached = None
        else:
            begun, end = (0, 0) if last is None else last.span(stream.request.id)
            # Past all that was computed in the step that died before: that step was not what kills.
            further = stream.reached is not None and begun >= stream.reached > 0
            stream.reached = end
        if stream.got_on or further:
            stream.fruitless = stream.lone_deaths = 0
            stream.suspect = False
        else:
            stream.fruitless += 1
            stream.lone_deaths += stream.suspect and last is not None and last.alone(stream.request.id)
        if stream.began and not resumes:
            stream.fail(EngineDied("The engine's process ended while it answered this request; it is being started again.", retry_after=1))
        elif stream.fruitless >= MAX_SUBMISSIONS and (last is None or not resumes):
            stream.fail(EngineDied(f"The engine's process ended {stream.fruitless} times while this request waited for it."))
        elif stream.lone_deaths >= LONE_DEATHS:
            self._convict(stream)
        elif (refusal := self._closed or self._unavailable or self.quarantined.refusal(stream.request)) is not None:
            stream.fail(refusal)
        else:
            if not stream.got_on and not further:
                stream.suspect |= last is None or last.took_part(stream.request.id) or stream.fruitless >= MAX_SUBMISSIONS
            if stream.got_on and not stream.model:
                stream.model = self._card.fingerprint
            self._waiting[stream.handle] = stream

    def _complete(self, stream: _Stream) -> None:
        """All was said but the report."""
        if self._meters is not None:
            stream.cached = stream.cached or self._meters.restart(stream.request.id, stream.tokens)
        report = Report(len(stream.request.prompt), stream.cached, stream.tokens, 0.0, 0.0, 0.0)
        stream.pending = [*stream.pending, report]
        stream.done = True
        self._counted(stream, report)
        stream.wake()

    def _convict(self, stream: _Stream) -> None:
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


def _turn(stream: _Stream) -> tuple[bool, int]:
    """Suspects first, and of them those first that no engine of their own has died with: kills from outside don't hit the same one again
    and again."""
    return not stream.suspect, stream.lone_deaths


def _at_deadline(stream: _Stream) -> None:
    stream.home._at_deadline(stream)


def _handed_over(stream: _Stream, take: TakesBatch, events: list[Event]) -> bool:
    """Whether they were taken at once, of a stream whose reader waits for them."""
    if not take(events):
        return False
    stream.was_seen(events)
    return True


def _weight(event: Event) -> int:
    """Bytes of memory that an event takes, or so."""
    if type(event) is Delta:
        weight = 200 + 36 * len(event.tokens) + len(event.text)
        if event.logprobs:
            weight += sum([200 + 200 * len(each.top) for each in event.logprobs])
        return weight
    return 200 + 200 * len(event.scores) if type(event) is PromptScores else 200


def _portion(events: list[Event]) -> list[Event]:
    """The first of them, as many as are worth a write."""
    weight = 0
    for number, event in enumerate(events):
        if weight > PORTION:
            return events[:number]
        weight += _weight(event)
    return events


def _merged(events: list[Event]) -> list[Event]:
    """Deltas that follow each other in one, a portion each, where nothing but tokens and text is in them."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if (
            type(event) is Delta
            and type(last) is Delta
            and last.choice == event.choice
            and last.finish is None
            and not (last.logprobs or event.logprobs)
            and _weight(last) < PORTION
        ):
            merged[-1] = Delta(last.choice, last.index, last.tokens + event.tokens, last.text + event.text, event.finish, event.stop_reason)
        else:
            merged.append(event)
    return merged


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
