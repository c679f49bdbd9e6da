"""One engine, any number of API processes: takes their frames, runs their requests, sends back each step's events."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import structlog

from headrace.engine.admission import Admission, Entry, TellsPace
from headrace.engine.crowding import Crowding
from headrace.engine.frames import (
    MAX_UNREAD,
    Cancel,
    Counting,
    Crowded,
    Ended,
    Failed,
    FrameConnection,
    FrameTooLarge,
    Hello,
    Stats,
    StatsRequest,
    Step,
    Submit,
    ToWorker,
)
from headrace.engine.held import Held, HeldBack
from headrace.engine.suspects import Turns
from headrace.errors import EngineUnavailable, HeadraceError, RequestFailed, StoreUnavailable
from headrace.ports import Counter, Counters, Deliver, Engine, NotesSteps, StepNotes, Submits, TellsCached
from headrace.types import Delta, EngineCard, Event, GenerateRequest, Report
from headrace.waiting import Bounds, Queue

RELEASE_INTERVAL = 0.1
"""Seconds between looks whether a request that is held back may go, besides those after every step."""


class EngineServer:
    """Serves an engine over a listening unix socket's connections, each of which is an API process.

    `max_unread`: bytes that an API process may leave unread before its connection is closed. `open_counters` opens the file in which an
    API process wants its requests' tokens counted; it raises `OSError` and `ValueError`. `notes` is what the API processes look at after
    this process's death.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pid: int,
        max_unread: int = MAX_UNREAD,
        open_counters: Callable[[str], Counters] | None = None,
        notes: StepNotes | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._engine = engine
        self._pid = pid
        self.open_counters = open_counters
        self._max_unread = max_unread
        self._clients: set[_ApiProcess] = set()
        self._hello: Hello | None = None
        self._ids: set[str] = set()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._resumed = 0
        self._turns = Turns(self._start)
        self._turns.notes = notes
        self._admission = admission
        self._crowding = None if admission is None else Crowding(admission, self._tell)
        self._held = None if admission is None else HeldBack(admission)
        self._releasing: asyncio.Handle | None = None
        self._release_at = 0.0
        if isinstance(engine, NotesSteps):
            engine.notes = notes
        if admission is not None and isinstance(engine, TellsPace):
            admission.pace = engine.pace

    def accept(self) -> asyncio.Protocol:
        """A protocol factory, for `create_unix_server`."""
        client = _ApiProcess(self)
        return FrameConnection[ToWorker](
            ToWorker,
            client.received,
            client.lost,
            made=lambda connection: self._joined(client, connection),
            max_unread=self._max_unread,
        )

    def ready(self, card: EngineCard) -> None:
        """Say hello to those connected, and from now on to all who come."""
        self._turns.resumes = "resume" in card.capabilities and isinstance(self._engine, Submits)
        self._hello = Hello(card, self._pid)
        for client in self._clients:
            client.connection.send(self._hello)

    @property
    def stats(self) -> Stats:
        stats = msgspec.structs.replace(self._engine.stats(), resumed=self._resumed)
        return Stats(stats if self._admission is None else self._admission.stats(stats))

    def _joined(self, client: _ApiProcess, connection: FrameConnection[ToWorker]) -> None:
        client.connection = connection
        self._clients.add(client)
        if self._hello is not None:
            connection.send(self._hello)

    def left(self, client: _ApiProcess) -> None:
        self._clients.discard(client)

    def run(
        self, request: GenerateRequest, deliver: Deliver, counter: Counter | None = None, *, suspect: bool = False, again: bool = False
    ) -> Callable[[], None]:
        """Start a request, as soon as no suspect is in its way; what comes back cancels it. `deliver` gets exactly one `Report` or
        error, last.

        Tokens are counted before they are delivered.
        """
        if request.id in self._ids:
            # Cancelling goes by id, and one tenant's choice of id must not reach another's request.
            request = msgspec.structs.replace(request, id=f"{request.id}~{next(self._numbers)}")
        self._resumed += request.resume is not None
        begun = False
        entry: Entry | None = None
        cancel = outwaited = _nothing
        admission, crowding = self._admission, self._crowding
        if admission is not None and crowding is not None:
            try:
                entry = admission.admit(request, lambda: cancel(), known=again)
            except HeadraceError as refusal:
                if counter is not None:
                    counter.end(None)
                crowding.refused(request)
                deliver(refusal)
                return _nothing
            patience = admission.bounds.wait if request.timeout is None else min(request.timeout, admission.bounds.wait)
            if entry.held or patience == admission.bounds.wait:
                outwaited = asyncio.get_running_loop().call_later(patience, admission.outwaited, entry).cancel
            crowding.changed()
        self._ids.add(request.id)

        def deliver_and_note(what: Sequence[Event] | HeadraceError) -> None:
            nonlocal begun
            if entry is not None and admission is not None and crowding is not None:
                over = isinstance(what, HeadraceError) or type(what[-1]) is Report
                if not isinstance(what, HeadraceError):
                    admission.progressed(entry, sum([len(event.tokens) for event in what if type(event) is Delta]))
                if over:
                    admission.ended(entry, cut=isinstance(what, HeadraceError) or not any(_finishes(event) for event in what))
                if over or entry.generated:
                    outwaited()
                # Each step changes what those that wait are predicted; all of its batches come in one turn of the loop, or two.
                self._release_soon()
                if over and entry.shed is not None:
                    crowding.refused(request)
                    what = entry.shed
                crowding.changed()
            if isinstance(what, HeadraceError):
                self._ids.discard(request.id)
                if counter is not None:
                    counter.end(None)
            elif type(last := what[-1]) is Report:
                self._ids.discard(request.id)
                if counter is not None:
                    counter.end(_of_this_engine(last, request))
            elif counter is not None:
                if not begun:
                    begun = True
                    counter.prompt(len(request.prompt), self._cached_tokens(request.id))
                counter.add(sum([len(event.tokens) for event in what if type(event) is Delta]))
            deliver(what)

        def start() -> Callable[[], None]:
            wanted = request
            if entry is not None:
                waited = entry.began_to_wait - entry.received_at
                wanted = msgspec.structs.replace(request, rank=entry.line[1], waited=waited)
            return self._turns.run(wanted, deliver_and_note, suspect=suspect)

        if entry is not None and entry.held and self._held is not None:
            held = Held(entry, start, lambda: deliver_and_note([Report(0, 0, 0, 1e3 * (time.monotonic() - entry.received_at), 0.0, 0.0)]))
            self._held.add(held)
            self._release_soon()
            cancel = held.cancel
        else:
            cancel = start()
        return lambda: cancel()

    def _release_soon(self, pause: float = 0.0) -> None:
        if self._held is None or not len(self._held):
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + pause
        if self._releasing is not None:
            if self._release_at <= at:
                return
            # What has just changed doesn't wait for the next look.
            self._releasing.cancel()
        self._release_at = at
        self._releasing = loop.call_later(pause, self._release)

    def _release(self) -> None:
        self._releasing = None
        if self._held is not None:
            self._held.release()
            self._release_soon(RELEASE_INTERVAL)

    def _tell(self, queue: Queue, bounds: Bounds) -> None:
        message = Crowded(queue, bounds)
        for client in self._clients:
            client.connection.send(message)

    def _start(self, request: GenerateRequest, deliver: Deliver) -> Callable[[], None]:
        if isinstance(self._engine, Submits):
            self._submit(self._engine, request, deliver)
            return lambda: self._cancel(request.id)
        task = asyncio.create_task(self._pump(request, deliver), name=request.id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return lambda: _cancel_task(task)

    def _cached_tokens(self, request_id: str) -> int:
        return self._engine.cached_tokens(request_id) if isinstance(self._engine, TellsCached) else 0

    def _cancel(self, request_id: str) -> None:
        assert isinstance(self._engine, Submits)
        self._engine.cancel(request_id)

    def _submit(self, engine: Submits, request: GenerateRequest, deliver: Callable[[Sequence[Event] | HeadraceError], None]) -> None:
        try:
            engine.submit(request, deliver)
        except HeadraceError as error:
            deliver(error)
        except Exception as error:  # noqa: BLE001  the worker's outermost edge: an error belongs to one request
            deliver(_unexpected(request, error))

    async def _pump(self, request: GenerateRequest, deliver: Callable[[Sequence[Event] | HeadraceError], None]) -> None:
        last: Event | None = None
        try:
            events: Any = self._engine.generate(request)
            async with aclosing(events):
                async for batch in events:
                    if batch:
                        last = batch[-1]
                        deliver(batch)
            if type(last) is not Report:
                raise RequestFailed("The engine ended the request without a report.")
        except asyncio.CancelledError:
            deliver(EngineUnavailable("The request was cancelled."))
            raise
        except HeadraceError as error:
            deliver(error)
        except Exception as error:  # noqa: BLE001  the worker's outermost edge: an error belongs to one request
            deliver(_unexpected(request, error))
        finally:
            self._ids.discard(request.id)


class _ApiProcess:
    """One connection: its requests by handle, and what waits to be sent at the end of this turn of the loop."""

    connection: FrameConnection[ToWorker]

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._running: dict[int, Callable[[], None]] = {}
        self._cancelled: set[int] = set()
        """Handles that nobody waits for, but for their end."""
        self._counters: Counters | None = None
        self._counted = 0
        """Requests that are being counted."""
        self._gone = False
        self._batches: list[tuple[int, list[Event]]] = []
        self._ends: list[Failed | Ended] = []
        self._flush_due = False

    def received(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._start(message)
        elif isinstance(message, Cancel):
            cancel = self._running.pop(message.handle, None)
            if cancel is not None:
                self._cancelled.add(message.handle)
                cancel()
        elif isinstance(message, Counting):
            self._count_in(message.path)
        elif isinstance(message, StatsRequest):
            self.connection.send(self._server.stats)

    def lost(self) -> None:
        running = [*self._running.values()]
        self._running.clear()
        for cancel in running:
            cancel()
        self._server.left(self)
        self._gone = True
        self._leave_counters()

    def _count_in(self, path: str) -> None:
        if self._counters is None and self._server.open_counters is not None:
            try:
                self._counters = self._server.open_counters(path)
            except (OSError, ValueError) as error:
                structlog.get_logger("headrace.worker").error("usage can't be counted", path=path, reason=str(error))

    def _leave_counters(self) -> None:
        """Let whoever settles for a dead API process know that its numbers are final."""
        if self._gone and not self._counted and self._counters is not None:
            self._counters.close()
            self._counters = None

    def _start(self, message: Submit) -> None:
        handle, slot = message.handle, message.slot
        counter: Counter | None = None
        if slot >= 0:
            if self._counters is None:
                why = "The engine can't count the request's tokens, so it can't be billed."
                self.connection.send(Failed(handle, StoreUnavailable.code, why, retry_after=1))
                return
            counter = self._counters.counter(slot)
            self._counted += 1
        ended = False
        running = self._running
        # Known before it is started: an engine may deliver from within `submit`.
        running[handle] = lambda: None

        def deliver(what: Sequence[Event] | HeadraceError) -> None:
            nonlocal ended
            if isinstance(what, HeadraceError):
                ended = True
                if running.pop(handle, None) is not None:
                    self._ends.append(Failed(handle, what.code, what.message, what.param, what.retry_after))
                    self._flush_soon()
                else:
                    self._end_cancelled(handle, None)
            else:
                report = what[-1] if type(what[-1]) is Report else None
                ended = report is not None
                if handle in running:
                    if ended:
                        del running[handle]
                    self._batches.append((handle, what if isinstance(what, list) else list(what)))
                    self._flush_soon()
                elif report is not None:
                    self._end_cancelled(handle, report)
            if ended and counter is not None:
                self._counted -= 1
                self._leave_counters()

        cancel = self._server.run(message.request, deliver, counter, suspect=message.suspect, again=message.again)
        if not ended:
            running[handle] = cancel

    def _end_cancelled(self, handle: int, report: Report | None) -> None:
        if handle in self._cancelled:
            self._cancelled.discard(handle)
            self._ends.append(Ended(handle, report))
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Everything that this turn of the loop delivered, in one frame."""
        self._flush_due = False
        batches, self._batches = self._batches, []
        ends, self._ends = self._ends, []
        if batches:
            try:
                self.connection.send(Step(batches))
            except (FrameTooLarge, UnicodeEncodeError):
                self._send_one_by_one(batches)
        for end in ends:
            self.connection.send(end)

    def _send_one_by_one(self, batches: list[tuple[int, list[Event]]]) -> None:
        for handle, events in batches:
            try:
                self.connection.send(Step([(handle, events)]))
            except (FrameTooLarge, UnicodeEncodeError) as error:
                cancel = self._running.pop(handle, None)
                if cancel is not None:
                    cancel()
                self.connection.send(Failed(handle, RequestFailed.code, f"The answer can't be sent: {error}."))


def _of_this_engine(report: Report, request: GenerateRequest) -> Report:
    """The report without the tokens that an engine before this one has made, and counted."""
    if request.resume is None:
        return report
    return msgspec.structs.replace(report, completion_tokens=report.completion_tokens - request.resume.tokens)


def _finishes(event: Event) -> bool:
    return type(event) is Delta and event.finish is not None


def _nothing() -> None:
    """Cancels what has never begun."""


def _cancel_task(task: asyncio.Task[None]) -> None:
    task.cancel()


def _unexpected(request: GenerateRequest, error: Exception) -> RequestFailed:
    structlog.get_logger("headrace.worker").error("request failed", request_id=request.id, exc_info=error)
    return RequestFailed(f"The engine failed on this request ({type(error).__name__}); it is in the server's log under {request.id}.")
