"""The response cache: an answer that was given before is given again, and one that is being given is shared.

Only for requests whose answer is determined (temperature 0, or a seed), or that ask for it. What is kept is what left the output filters,
and only if it is complete. Nothing crosses tenants: the tenant is part of the key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec

from headrace.call import Call
from headrace.errors import DeadlineExceeded
from headrace.logs import REQUEST_ID
from headrace.policies.answer_key import answer_key
from headrace.policies.single_flight import Flight
from headrace.policies.stored_answer import Recorder, StoredAnswer, pack, unpack
from headrace.policies.turns import Turn, Turns
from headrace.ports import Answers, KeepsOld
from headrace.records import CacheTags
from headrace.served import ServedModel, ServedModels
from headrace.types import Event, GenerateRequest

HEADER = "x-headrace-cache"
LARGEST = 2 * 1048576
"""Bytes of an answer that is kept; larger ones (very many log-probabilities) would push out too much else."""

Use = Literal["off", "write", "all"]


class ResponseCache:
    """Sets `call.source` to a kept answer, or `call.share` for one that is under way. `cached_price` is a fraction of a token.

    `salt` stands for what shapes answers on this server besides the model: filters, as a rule. `turns`: where other processes of the
    server may be asked for the same answers.
    """

    def __init__(
        self, answers: Answers, models: ServedModels, *, cached_price: float = 0.0, salt: bytes = b"", turns: Turns | None = None
    ) -> None:
        self._answers = answers
        self._models = models
        self._price = cached_price
        self._salt = salt
        self._turns = turns
        self._flights: dict[bytes, Flight] = {}
        self._looking_again: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Different answers that are being made in this process."""
        return len(self._flights)

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        use = wanted(call)
        key = self._key(call) if use != "off" else None
        if key is None:
            call.headers[HEADER] = "off"
            yield
            return
        call.headers[HEADER] = "miss"
        if use == "write":
            purges, recorder = self._answers.purges, Recorder()
            call.taps.append(recorder)
            yield
            self._keep(key, call, recorder, purges)
            return
        found = self._answers.recall(key)
        answer = unpack(found) if found is not None else None
        if answer is not None:
            self._replay(call, answer, "memory")
            yield
            return
        flight = self._flights.get(key)
        if flight is None or flight.purges != self._answers.purges:
            if flight is not None and flight.waiting is not None and flight.waiting.done():
                self._end_turn(flight, "apart")
            flight = self._flights[key] = Flight(self._answers.purges)
        flight.members += 1
        try:
            known = await self._look_up(flight, key)
            if known is None and self._turns is not None:
                known = await self._after_others(self._turns, flight, key, call)
            if known is not None:
                self._replay(call, *known)
                yield
            else:
                recorder = Recorder()
                call.taps.append(recorder)
                self._join(call, flight)
                yield
                if flight.generation is not None and not flight.generation.stored and flight.generation.first.storable:
                    flight.generation.stored = self._keep(key, call, recorder, flight.purges, flight.turn)
        finally:
            flight.members -= 1
            if not flight.members:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                self._end_turn(flight, "left" if flight.nobody_is_left else "apart")

    async def old(self, call: Call, request: GenerateRequest, model: ServedModel) -> list[list[Event]] | None:
        """What was once answered to this very request, even if it has expired: better than nothing while the model can't answer."""
        if not isinstance(self._answers, KeepsOld) or "no-store" in call.cache_control.lower() or call.cache is False:
            return None
        key = self._key_of(call, request, model)
        found = await self._answers.old(key) if key is not None else None
        answer = unpack(found[0]) if found is not None else None
        if answer is None or found is None:
            return None
        self._replay(call, answer, found[1])
        return [answer.again()]

    def _key(self, call: Call) -> bytes | None:
        assert call.request is not None, "the prepare step makes the request"
        return self._key_of(call, call.request, self._models.find(call.served_model))

    def _key_of(self, call: Call, request: GenerateRequest, model: ServedModel) -> bytes | None:
        """None where it can't be said what determines the answer."""
        if model.card is None:
            return None
        try:
            return answer_key(
                request,
                tenant=call.subject_tenant,
                model=model.files.name,
                fingerprint=f"{model.files.fingerprint}/{model.card.fingerprint}",
                salt=self._salt,
            )
        except UnicodeEncodeError:
            return None

    async def _look_up(self, flight: Flight, key: bytes) -> tuple[StoredAnswer, str] | None:
        """What the second level has. One look-up for all who ask at the same time."""
        if flight.looking is None:
            looking = flight.looking = asyncio.get_running_loop().create_future()
            found: tuple[StoredAnswer, str] | None = None
            try:
                found = await self._fetched(key)
            finally:
                looking.set_result(found)
            return found
        # Shielded: a future that is awaited by many must not be cancelled by one.
        return await asyncio.shield(flight.looking)

    async def _fetched(self, key: bytes) -> tuple[StoredAnswer, str] | None:
        fetched = await self._answers.fetch(key)
        answer = unpack(fetched[0]) if fetched is not None else None
        return (answer, fetched[1]) if answer is not None and fetched is not None else None

    async def _after_others(self, turns: Turns, flight: Flight, key: bytes, call: Call) -> tuple[StoredAnswer, str] | None:
        """What another process of this machine has made of the same request meanwhile; None where it is to be made here.

        Raises `DeadlineExceeded`.
        """
        waiting = flight.waiting
        if waiting is None:
            if flight.generation is not None or not turns.useful:
                # One that runs here already, begun while the second level rested, is joined.
                return None
            waiting = flight.waiting = asyncio.get_running_loop().create_future()
            flight.turn = turns.begin(key, lambda word: self._turn_came(turns, flight, key, word), lambda: flight.stands_still)
        if not waiting.done():
            # Its headers may have to go before it is known.
            call.headers[HEADER] = "hit"
            try:
                await _until(waiting, call.seconds_left())
            except DeadlineExceeded:
                call.headers[HEADER] = "miss"
                raise
            if waiting.result() is None:
                call.headers[HEADER] = "miss"
                if call.deadline is not None and call.request is not None:
                    # An engine reckons from the moment that it is asked.
                    call.request = msgspec.structs.replace(call.request, timeout=call.seconds_left())
        return waiting.result()

    def _turn_came(self, turns: Turns, flight: Flight, key: bytes, word: Literal["make", "look"]) -> None:
        assert flight.waiting is not None
        if word == "make":
            if flight.purges != self._answers.purges:
                # What is made here isn't kept, so that nobody is to wait for it.
                self._end_turn(flight, "apart")
            flight.waiting.set_result(None)
        else:
            self._looking_again.add(task := asyncio.create_task(self._look_again(turns, flight, key), name="look again"))
            task.add_done_callback(self._looking_again.discard)

    async def _look_again(self, turns: Turns, flight: Flight, key: bytes) -> None:
        REQUEST_ID.set("")  # it works for all, whoever was the first
        turn, waiting, found = flight.turn, flight.waiting, None
        try:
            found = await self._fetched(key)
        finally:
            if turn is not None and waiting is not None and flight.turn is turn:  # else all have left
                if found is None and not turn.asked_again:
                    turn.ask_again()
                else:
                    # Twice not found where it should be: it may be too large for that level, so there is no use in waiting again.
                    turns.forget(turn)
                    flight.turn = None
                    waiting.set_result(found)

    def _end_turn(self, flight: Flight, how: Literal["left", "apart"]) -> None:
        turn, flight.turn = flight.turn, None
        if turn is not None and self._turns is not None:
            self._turns.end(turn, how)

    def _replay(self, call: Call, answer: StoredAnswer, level: str) -> None:
        call.headers[HEADER] = "hit"
        call.notes.update(answer.notes)
        call.source = Given(answer.again())
        outcome = call.outcome
        outcome.served_from, outcome.cache_level, outcome.cached_price = "cache", level, self._price
        outcome.own_prompt_tokens = outcome.own_completion_tokens = 0

    def _join(self, call: Call, flight: Flight) -> None:
        assert call.request is not None
        timeout, sampling, model = call.request.timeout, call.request.sampling, call.served_model
        # The generation may outlive this call, so each listener sees to its own deadline; whether that can be met is asked for whoever
        # begins it.
        begins = flight.generation is None or not flight.generation.usable
        call.request = msgspec.structs.replace(call.request, timeout=None, wanted_within=timeout if begins else None)

        def share(source: AsyncIterator[list[Event]]) -> AsyncIterator[list[Event]]:
            call.outcome.cached_price = self._price
            assert call.request is not None
            # What is left of it after the steps since then.
            limit = None if timeout is None else call.seconds_left() or timeout
            if call.request.sampling != sampling or call.served_model != model:
                # A later step has made it another request: cut to a budget, degraded, sent to another model.
                call.storable = False
            if not call.storable:
                if flight.generation is None:
                    # What is made here is not for others.
                    self._end_turn(flight, "apart")
                return Flight().listen(call, source, limit)
            listener = flight.listen(call, source, limit)
            if listener.generation.first is not call:
                call.headers[HEADER] = "hit"
            return listener

        call.share = share

    def _keep(self, key: bytes, call: Call, recorder: Recorder, purges: int, turn: Turn | None = None) -> bool:
        """Whether it was worth keeping. What was purged while it was made is not kept."""
        answer = recorder.answer(call, call.notes) if call.storable and purges == self._answers.purges else None
        if answer is None:
            return False
        try:
            packed = pack(answer)
        except UnicodeEncodeError:
            return False
        if len(packed) > LARGEST:
            return False
        model = self._models.find(call.served_model).files.name
        if turn is not None and self._turns is not None:
            self._turns.keep(turn)
        self._answers.keep(key, packed, CacheTags(call.subject_tenant, model, call.caller.id if call.caller is not None else ""))
        return True


def wanted(call: Call) -> Use:
    """What a call wants of the cache.

    The header's words are RFC 9111's: `no-cache` (and `max-age=0`) wants a fresh answer, which may be kept; `no-store` wants nothing
    kept, and is not answered from the cache either.
    """
    words = {word.strip() for word in call.cache_control.lower().split(",")} if call.cache_control else ()
    determined = call.sampling.temperature == 0 or call.sampling.seed is not None
    # What isn't storable before it is made is a fallback's, which is nobody else's answer either.
    if not call.storable or call.cache is False or "no-store" in words or not (determined or call.cache):
        return "off"
    return "write" if "no-cache" in words or "max-age=0" in words else "all"


async def _until(done: asyncio.Future[Any], seconds: float | None) -> None:
    """Returns when it is; others may wait for it, too. Raises `DeadlineExceeded`. Half of what a shield and a timeout cost."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, wake)
    done.add_done_callback(wake)
    try:
        await waiter
    finally:
        done.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()
    if not done.done():
        raise DeadlineExceeded("The request's time was over while another process was answering an equal one.")


class Given:
    """One batch of events that are at hand. A class, because a generator costs several times as much."""

    __slots__ = ("_events",)

    def __init__(self, events: list[Event]) -> None:
        self._events: list[Event] | None = events

    def __aiter__(self) -> Given:
        return self

    async def __anext__(self) -> list[Event]:
        events, self._events = self._events, None
        if events is None:
            raise StopAsyncIteration
        return events
