"""A request on its way through engine workers: what has arrived of it, what its reader has, and which workers died with it.

What becomes of it is decided by its home, `engines.EngineClient`.
"""

from __future__ import annotations

import asyncio
from typing import Literal, Protocol

import msgspec

from headrace.engine.step_notes import LastStep
from headrace.engine_deaths import Death
from headrace.errors import HeadraceError
from headrace.ports import TakesBatch
from headrace.types import Delta, Event, GenerateRequest, PromptScores, Report

PORTION = 4 * 1024
"""Bytes of a stream's events, by `_weight`, that a slow reader gets at once."""
MAX_SUBMISSIONS = 3
"""A request that saw this many workers die without getting on may be the reason, whatever was noted of their last steps: a suspect. Of
engines that nothing is noted of, it is ended."""


class Home(Protocol):
    """The client of a worker, which has its requests."""

    def open(self, request: GenerateRequest) -> EngineStream:
        """Begin with it. Raises what it is refused with."""
        ...

    def was_read(self, stream: EngineStream) -> None:
        """Its reader took a part of what had arrived."""
        ...

    def forget(self, stream: EngineStream) -> None:
        """Its reader wants no more of it, or has all."""
        ...

    def at_deadline(self, stream: EngineStream) -> None:
        """Its time is over."""
        ...


class EngineStream:
    """A request of this API process, from `generate` to its end."""

    __slots__ = (
        "asked_at",
        "began",
        "behind_since",
        "cached",
        "deadline",
        "deaths",
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

    def __init__(self, request: GenerateRequest, home: Home, handle: int, deadline: float) -> None:
        self.request = request
        self.home = home
        """Another one where its worker died and a replica went on with it."""
        self.handle = handle
        """Its name between its home and the worker."""
        self.deadline = deadline
        """By the event loop's clock."""
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
        self.deaths: list[Death] = []
        """Of workers, for which it is one of the suspects."""
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
        if self.deaths:
            self._cleared()
        generated = self.generated
        for event in events:
            if type(event) is Delta:
                generated[event.choice].extend(event.tokens)
                if event.finish is not None:
                    self.ended.add(event.choice)
            elif type(event) is PromptScores:
                self.scored = True

    @property
    def all_said(self) -> bool:
        """Whether every choice has ended, and only the report may be missing."""
        return len(self.ended) == len(self.generated)

    def arrived(self, events: list[Event]) -> None:
        """They wait to be read."""
        self.pending += events
        self.held += sum(map(_weight, events))

    def merge(self) -> None:
        """Make what waits to be read smaller."""
        self.pending = _merged(self.pending)
        self.held = sum(map(_weight, self.pending))

    def read(self) -> list[Event]:
        """What has arrived, or as much of it as a slow reader gets at once."""
        batch = self.pending
        if self.held:
            batch = _portion(batch)
            self.pending = self.pending[len(batch) :]
        else:
            self.pending = []
        self.home.was_read(self)
        self._was_seen(batch)
        return batch

    def hand_over(self, events: list[Event]) -> bool:
        """Give them to a reader that waits for them, without waking it; False where they have to wait to be read."""
        if self.take is None or self.waiter is None or not self.take(events):
            return False
        self._was_seen(events)
        return True

    def _was_seen(self, events: list[Event]) -> None:
        """Its reader has them, if it is on a bill."""
        if self.slot is not None and self.slot >= 0:
            for event in events:
                if type(event) is Delta:
                    self.seen += len(event.tokens)

    def outlived(self, last: LastStep | None, *, from_outside: bool = False) -> None:
        """Its worker died, and had noted `last` of its last step. Finds out whether it may be what workers die of, which takes more than to
        have been in that step where somebody kills them `from_outside`: alone, one after the other, few would get on between two kills."""
        further = False
        if self.got_on:
            self.reached = None
        else:
            begun, end = (0, 0) if last is None else last.span(self.request.id)
            # Past all that was computed in the step that died before: that step was not what kills.
            further = self.reached is not None and begun >= self.reached > 0
            self.reached = end
        if self.got_on or further:
            self.fruitless = self.lone_deaths = 0
            self.suspect = False
            return
        self.fruitless += 1
        self.lone_deaths += self.suspect and last is not None and last.alone(self.request.id)
        took_part = last is None or (last.took_part(self.request.id) and not from_outside)
        self.suspect |= took_part or self.fruitless >= MAX_SUBMISSIONS

    @property
    def turn(self) -> tuple[bool, int, int]:
        """Where it comes in order: suspects first, and of them those first that no engine of their own has died with: kills from outside
        don't hit the same one again and again. Then who got nothing from the most workers."""
        return not self.suspect, self.lone_deaths, -self.fruitless

    def _cleared(self) -> None:
        """It got on after all."""
        deaths, self.deaths = self.deaths, []
        for death in deaths:
            death.cleared()

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

    def time_out(self) -> None:
        """Its time is over."""
        self.home.at_deadline(self)

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

    __slots__ = ("_home", "_over", "_request", "_stream")

    def __init__(self, home: Home, request: GenerateRequest) -> None:
        self._home = home
        self._request = request
        self._stream: EngineStream | None = None
        self._over = False

    def __aiter__(self) -> Reading:
        return self

    async def __anext__(self) -> list[Event]:
        if self._over:
            raise StopAsyncIteration
        stream = self._stream
        try:
            if stream is None:
                stream = self._stream = self._home.open(self._request)
            while True:
                if stream.pending:
                    return stream.read()
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
                self._stream.home.forget(self._stream)


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
