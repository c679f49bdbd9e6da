"""Single flight: identical requests that are under way share one generation.

The generation runs in a task of its own, so that no listener's slow reading, and no listener's end, is felt by another. Whoever begins it
pays for its tokens. When the payer leaves, the one who has listened longest takes over the bill for what is generated from then on; when
the last one leaves, it is cancelled.

The task has the first batch and the last one to do, and what finds somebody slow. All others go from the source straight to the listeners
who wait for them, and from there to where they are written (`ports.HandsOver`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from headrace.call import Call
from headrace.errors import DeadlineExceeded, DeadlineUnmeetable
from headrace.policies.stored_answer import StoredAnswer
from headrace.policies.turns import Turn
from headrace.types import Delta, Event, Report

AHEAD = 8
"""Batches that a generation may be ahead of whoever has read most of it."""
AT_ONCE = 8
"""Most batches that a listener is given in one."""


class Generation:
    """One run of an engine, and those who listen to it. Its task ends with the source, or when nobody listens any more."""

    __slots__ = ("_room", "_task", "batches", "error", "first", "generated", "listeners", "over", "payer", "prompt_paid", "stored")

    def __init__(self, first: Call, source: AsyncIterator[list[Event]]) -> None:
        self.first = first
        """The call that began it: whose headers say what served it, and whose steps may have declared it not storable."""
        self.batches: list[list[Event]] = []
        self.over = False
        self.error: BaseException | None = None
        self.listeners: list[Listener] = []
        """Those who are still there, in the order they came."""
        self.payer: Listener | None = None
        self.generated = 0
        self.prompt_paid = False
        self.stored = False
        self._room: asyncio.Future[None] | None = None
        """What the task waits for while it is too far ahead."""
        self._task = asyncio.create_task(self._run(source), name=f"generation {first.id}")

    @property
    def usable(self) -> bool:
        """Whether newcomers can join."""
        return self.error is None

    def take_in(self, listener: Listener) -> None:
        """A listener more, who gets all from the beginning. The first one pays."""
        outcome = listener.call.outcome
        outcome.own_prompt_tokens = outcome.own_completion_tokens = 0
        outcome.engine_request = self.first.id
        outcome.served_from = "shared"
        self.listeners.append(listener)
        if self.payer is None and not self.over:
            outcome.served_from = "engine"
            self._charge(listener)

    def leave(self, listener: Listener) -> asyncio.Task[None] | None:
        """Idempotent. The task, if it was cancelled because this was the last listener."""
        if listener not in self.listeners:
            return None
        self.listeners.remove(listener)
        listener.call.outcome.others_go_on = bool(self.listeners)
        if self.over:
            return None
        if not self.listeners:
            self.error = asyncio.CancelledError()
            self._task.cancel()
            return self._task
        if self.payer is listener:
            self._charge(self.listeners[0])
        return None

    def _charge(self, listener: Listener) -> None:
        """What is generated from now on is on this listener's bill; the prompt too, if its count was known to nobody who has paid."""
        self.payer = listener
        if not self.prompt_paid and listener.call.outcome.prompt_tokens:
            listener.call.outcome.own_prompt_tokens = listener.call.outcome.prompt_tokens
            self.prompt_paid = True

    def read_on(self) -> None:
        """A listener has read what it was given."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    @property
    def stands_still(self) -> bool:
        """Whether it is for readers to get on: it is too far ahead of them, or has come to its end."""
        return self.over or self._room is not None

    @property
    def _far_ahead(self) -> bool:
        return len(self.batches) - max([listener.at for listener in self.listeners], default=0) > AHEAD

    async def _run(self, source: AsyncIterator[list[Event]]) -> None:
        try:
            try:
                handed_over = False
                async for batch in source:
                    self._took(batch)
                    while self._far_ahead:
                        # Nobody reads as fast as that. What is generated meanwhile is the engine client's to hold back.
                        room = self._room = asyncio.get_running_loop().create_future()
                        await room
                    if not handed_over:
                        handed_over = True
                        hand_to = getattr(source, "hand_to", None)
                        if hand_to is not None:
                            hand_to(self._take)
            finally:
                close = getattr(source, "aclose", None)
                if close is not None:
                    await close()
        except asyncio.CancelledError as error:
            self.error = error
            raise
        except Exception as error:  # noqa: BLE001 - it is raised in every listener
            self.error = error
        finally:
            self.over = True
            for listener in self.listeners:
                listener.wake()

    def _take(self, batch: list[Event]) -> bool:
        """A batch that comes while the task waits for one, and doesn't wake it."""
        if self._far_ahead:
            return False
        self._took(batch)
        return True

    def _took(self, batch: list[Event]) -> None:
        self.batches.append(batch)
        payer = self.payer
        assert payer is not None, "whoever begins a generation listens to it"
        outcome = payer.call.outcome
        own = outcome.own_completion_tokens or 0
        for event in batch:
            if type(event) is Delta:
                made = len(event.tokens)
                own += made
                self.generated += made
            elif type(event) is Report:
                # Tokens that a stop string held back were generated too, and a remote engine's are counted only now.
                own = max(0, own + event.completion_tokens - self.generated)
                self.generated = event.completion_tokens
                if not self.prompt_paid:
                    outcome.own_prompt_tokens = event.prompt_tokens
                    self.prompt_paid = True
        outcome.own_completion_tokens = own
        for listener in self.listeners:
            listener.offer(batch)


class Listener:
    """Event batches of a generation, for one call. Several that came while nobody asked come as one.

    Raises the generation's error, and `DeadlineExceeded` at the call's own deadline.
    """

    __slots__ = (
        "_began_at",
        "_error",
        "_first_at",
        "_flight",
        "_late",
        "_source",
        "_stopped",
        "_take",
        "_timeout",
        "_timer",
        "_waiter",
        "at",
        "call",
        "generation",
    )

    def __init__(self, flight: Flight, call: Call, source: AsyncIterator[list[Event]], timeout: float | None) -> None:
        self._flight = flight
        self._source = source
        """What the call would be answered from by itself."""
        self._began_at = time.monotonic()
        self._first_at = 0.0
        """When it was given something first; 0 until then."""
        self.call = call
        self.at = 0
        """Batches that it was given."""
        self._timeout = timeout
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[list[Event]], bool] | None = None
        self._stopped = False
        self._error: Exception | None = None
        self._late = False
        self._timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, self._deadline)
        self.generation = flight.joined(self, source)

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> list[Event]:
        generation = self.generation
        while True:
            if self._stopped:
                raise self._error or StopAsyncIteration
            if self.at < len(generation.batches):
                if self.at == 0 and generation.first is not self.call:
                    self._as_the_first_was_served(generation.first)
                new = generation.batches[self.at : self.at + AT_ONCE]
                self.at += len(new)
                self._first_at = self._first_at or time.monotonic()
                generation.read_on()
                return self._told(new)
            if generation.over:
                if isinstance(generation.error, DeadlineUnmeetable) and generation.first is not self.call and not self.at:
                    # Another's deadline, which was the reason to refuse it: ours may well be met.
                    generation.leave(self)
                    generation = self.generation = self._flight.joined(self, self._source)
                    continue
                if generation.error is not None:
                    raise generation.error
                raise StopAsyncIteration
            if self._late:
                raise self._deadline_exceeded()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def aclose(self) -> None:
        """Leave. If that ends the generation, the engine knows when this returns. Idempotent."""
        self._take = None  # it knows this listener: a cycle, which only the garbage collector would find
        if self._timer is not None:
            self._timer.cancel()
        cancelled = self.generation.leave(self)
        if cancelled is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([cancelled])

    def hand_to(self, take: Callable[[list[Event]], bool]) -> None:
        """`ports.HandsOver`."""
        self._take = take

    def stop(self, error: Exception | None = None) -> None:
        """`ports.HandsOver`."""
        self._take = None
        self._stopped, self._error = True, error
        self.wake()

    def offer(self, batch: list[Event]) -> None:
        """The newest batch of the generation: to be taken at once by who waits for it, or read later. The last one is read."""
        take, waiter = self._take, self._waiter
        if (
            take is not None
            and waiter is not None
            and not waiter.done()
            and self.at == len(self.generation.batches) - 1
            and type(batch[-1]) is not Report
            and take(batch[:])
        ):
            self.at += 1
            return
        self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _deadline(self) -> None:
        self._late = True
        self.wake()

    def _deadline_exceeded(self) -> DeadlineExceeded:
        """In the words of an engine, which alone knows what it did before its first token."""
        now, limit = time.monotonic(), f"The request ran into its time limit of {self._timeout:g} s while it was"
        first = (self._first_at or now) - self._began_at
        if not self._first_at:
            return DeadlineExceeded(f"{limit} waiting for its first token: {first:.2f} s in the queue and in prefill.")
        tokens = self.call.outcome.completion_tokens
        spent = f"{first:.2f} s in the queue and in prefill, {now - self._first_at:.2f} s decoding ({tokens} tokens generated)"
        return DeadlineExceeded(f"{limit} decoding: {spent}.")

    def _as_the_first_was_served(self, first: Call) -> None:
        """Which model answers, and why, is only certain once it does. Limits and the like are the other caller's own."""
        self.call.served_model = first.served_model
        for name, value in first.headers.items():
            if name.startswith("x-headrace-"):
                self.call.headers.setdefault(name, value)

    def _told(self, batches: list[list[Event]]) -> list[Event]:
        events = [event for batch in batches for event in batch]
        outcome = self.call.outcome
        if events and isinstance(events[-1], Report) and outcome.served_from == "shared" and not outcome.own_completion_tokens:
            report = events[-1]
            events[-1] = Report(report.prompt_tokens, report.prompt_tokens, report.completion_tokens, 0.0, 0.0, 0.0)
        return events


class Flight:
    """The requests with one key that are under way in this process, from the look-up in the cache to their ends.

    `purges`: how many purges there had been when it began; those who come after another one begin anew.
    """

    __slots__ = ("generation", "looking", "members", "purges", "turn", "waiting")

    def __init__(self, purges: int = 0) -> None:
        self.purges = purges
        self.members = 0
        self.looking: asyncio.Future[tuple[StoredAnswer, str] | None] | None = None
        """What the second level of the cache has, and which level that is."""
        self.generation: Generation | None = None
        self.turn: Turn | None = None
        """At making the answer, among the API processes of this machine."""
        self.waiting: asyncio.Future[tuple[StoredAnswer, str] | None] | None = None
        """For that turn; what another process has made instead."""

    @property
    def stands_still(self) -> bool:
        return self.generation is not None and self.generation.stands_still

    @property
    def nobody_is_left(self) -> bool:
        """All have gone before there was an answer, and not because there can't be one."""
        return self.generation is None or isinstance(self.generation.error, asyncio.CancelledError)

    def listen(self, call: Call, source: AsyncIterator[list[Event]], timeout: float | None) -> Listener:
        """Join the generation, or begin one with `source` if there is none, or it failed, or all have left it; `timeout` in seconds from
        now."""
        return Listener(self, call, source, timeout)

    def joined(self, listener: Listener, source: AsyncIterator[list[Event]]) -> Generation:
        """The generation that the listener is now one of, begun with `source` where there was none to join."""
        if self.generation is None or not self.generation.usable:
            self.generation = Generation(listener.call, source)
        self.generation.take_in(listener)
        return self.generation
