"""Batches that go from a shared generation's source straight to those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from answers_in_memory import greedy, until

from headrace.policies.single_flight import AHEAD, Flight, Listener
from headrace.types import Delta, Event, Report

pytestmark = pytest.mark.anyio


class Source:
    """As the client of a worker: hands over while its reader waits, and is read otherwise."""

    def __init__(self) -> None:
        self.pending: list[list[Event]] = []
        self.waiter: asyncio.Future[None] | None = None
        self.take: Callable[[list[Event]], bool] | None = None
        self.made = self.read = self.closed = 0

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> list[Event]:
        while not self.pending:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        self.read += 1
        return self.pending.pop(0)

    def hand_to(self, take: Callable[[list[Event]], bool]) -> None:
        self.take = take

    def stop(self, error: Exception | None = None) -> None:
        raise AssertionError("a generation has no error of its own")

    async def aclose(self) -> None:
        self.closed += 1

    def say(self) -> None:
        event = Delta(0, self.made, (self.made,), f"{self.made} ")
        self.made += 1
        self.give([event])

    def give(self, batch: list[Event]) -> None:
        waits = self.waiter is not None and not self.waiter.done() and not self.pending
        if waits and self.take is not None and not isinstance(batch[-1], Report) and self.take(batch):
            return
        self.pending.append(batch)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Reader:
    """Reads a listener as the journey does: the first batch, and from then on what isn't put into its hands."""

    def __init__(self, listener: Listener, *, fails_at: int | None = None) -> None:
        self.listener = listener
        self.text = ""
        self.put = 0
        self.ready = True
        self._fails_at = fails_at
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            first = True
            async for batch in self.listener:
                self._note(batch)
                if first:
                    first = False
                    self.listener.hand_to(self._take)
        finally:
            await self.listener.aclose()

    def _take(self, batch: list[Event]) -> bool:
        if not self.ready:
            return False
        self.put += 1
        if self.put == self._fails_at:
            self.listener.stop(ValueError("can't be written"))
        else:
            self._note(batch)
        return True

    def _note(self, batch: list[Event]) -> None:
        self.text += "".join(event.text for event in batch if isinstance(event, Delta))


def expected(count: int) -> str:
    return "".join(f"{number} " for number in range(count))


async def began(source: Source, *readers: Reader) -> None:
    source.say()
    await until(lambda: all(reader.text == expected(1) for reader in readers))
    await until(lambda: source.take is not None and source.waiter is not None and not source.waiter.done())
    await until(lambda: all(reader.listener._waiter is not None for reader in readers))


def listen(flight: Flight, source: Source, number: int) -> Listener:
    return flight.listen(greedy(number), source, None)


async def test_batches_go_straight_to_all_who_wait() -> None:
    flight, source = Flight(), Source()
    readers = [Reader(listen(flight, source, number)) for number in range(3)]
    await began(source, *readers)
    for _ in range(20):
        source.say()  # and nothing else runs
    assert source.read == 1
    assert [reader.text for reader in readers] == [expected(21)] * 3
    source.give([Report(5, 0, 21, 1.0, 2.0, 3.0)])
    source.pending.append([])
    await until(lambda: flight.generation is not None and flight.generation.generated == 21)
    outcomes = [reader.listener.call.outcome for reader in readers]
    assert [outcome.own_completion_tokens for outcome in outcomes] == [21, 0, 0]
    for reader in readers:
        reader.task.cancel()
    await asyncio.wait([reader.task for reader in readers])
    assert source.closed == 1
    assert [reader.listener._take for reader in readers] == [None] * 3  # it knows the listener


async def test_who_cant_take_it_reads_it_later_and_in_order() -> None:
    flight, source = Flight(), Source()
    quick, slow = Reader(listen(flight, source, 1)), Reader(listen(flight, source, 2))
    await began(source, quick, slow)
    slow.ready = False
    for _ in range(5):
        source.say()
    assert quick.text == expected(6)
    await until(lambda: slow.text == expected(6))
    slow.ready = True
    await until(lambda: slow.listener._waiter is not None)
    source.say()
    assert quick.text == slow.text == expected(7)
    assert (quick.put, slow.put) == (6, 1)
    late = Reader(listen(flight, source, 3))
    await until(lambda: late.text == expected(7))
    for reader in (quick, slow, late):
        reader.task.cancel()
    await asyncio.wait([quick.task, slow.task, late.task])


async def test_a_generation_that_nobody_follows_is_not_taken() -> None:
    flight, source = Flight(), Source()
    listener = listen(flight, source, 1)
    source.say()
    assert await anext(listener)
    await until(lambda: source.take is not None and source.waiter is not None and not source.waiter.done())
    for _ in range(AHEAD + 5):
        source.say()
    assert flight.generation is not None
    assert len(flight.generation.batches) == 2 + AHEAD
    text = expected(1)
    while len(text) < len(expected(AHEAD + 6)):
        text += "".join(event.text for event in await anext(listener) if isinstance(event, Delta))
    assert text == expected(AHEAD + 6)
    await listener.aclose()
    assert source.closed == 1


async def test_one_that_fails_ends_alone() -> None:
    flight, source = Flight(), Source()
    failing, other = Reader(listen(flight, source, 1), fails_at=2), Reader(listen(flight, source, 2))
    await began(source, failing, other)
    for _ in range(4):
        source.say()
    with pytest.raises(ValueError, match="can't be written"):
        await failing.task
    assert failing.text == expected(2)
    assert other.text == expected(5)
    outcomes = failing.listener.call.outcome, other.listener.call.outcome
    source.say()
    assert [outcome.own_completion_tokens for outcome in outcomes] == [5, 1]
    other.task.cancel()
    await asyncio.wait([other.task])
