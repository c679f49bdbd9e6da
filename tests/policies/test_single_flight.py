from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from answers_in_memory import ToldEngine, greedy, told_journey, until
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.call import Call
from headrace.errors import DeadlineExceeded, DeadlineUnmeetable, RateLimited, RequestFailed
from headrace.journey import Journey
from headrace.types import Delta, Event

pytestmark = pytest.mark.anyio


class Reader:
    """A client of the journey, in a task of its own."""

    def __init__(self, journey: Journey, call: Call) -> None:
        self.call = call
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._read(journey))

    async def _read(self, journey: Journey) -> None:
        async for batch in journey.run(self.call):
            self.events += batch

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    async def hang_up(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def join(journey: Journey, engine: ToldEngine, call: Call) -> Reader:
    """A reader whose journey has come to the engine, or to another's generation."""
    reader = Reader(journey, call)
    await until(lambda: call.outcome.engine_request)
    await until(lambda: call.outcome.engine_request in {request.id for request in engine.requests})
    return reader


async def test_identical_requests_share_one_generation_and_the_first_pays() -> None:
    journey, engine, answers, cache = told_journey()
    first = await join(journey, engine, greedy(1))
    engine.say(0, "a")
    await until(lambda: first.text == "a")
    late = await join(journey, engine, greedy(2))
    await until(lambda: late.text == "a")
    engine.say(1, "b")
    await until(lambda: first.text == late.text == "ab")
    engine.say(2, "c", finish="stop")
    engine.end(5, 3)
    await asyncio.gather(first.task, late.task)
    assert first.text == late.text == "abc"
    assert len(engine.requests) == 1
    assert first.call.headers["x-headrace-cache"] == "miss"
    assert late.call.headers["x-headrace-cache"] == "hit"
    one, two = first.call.outcome, late.call.outcome
    assert (one.served_from, one.billed_prompt_tokens, one.billed_completion_tokens) == ("engine", 5, 3)
    assert (two.served_from, two.billed_prompt_tokens, two.billed_completion_tokens) == ("shared", 0, 0)
    assert (two.prompt_tokens, two.completion_tokens, two.cached_tokens) == (5, 3, 5)
    assert len(answers.kept) == 1
    assert cache.under_way == 0
    again = Reader(journey, greedy(3))
    await again.task
    assert again.text == "abc"
    assert again.call.outcome.served_from == "cache"
    assert len(engine.requests) == 1


async def test_when_the_first_hangs_up_the_next_takes_over_the_bill_from_there() -> None:
    journey, engine, answers, cache = told_journey(price=0.5)
    first = await join(journey, engine, greedy(1))
    second = await join(journey, engine, greedy(2))
    third = await join(journey, engine, greedy(3))
    for n in range(4):
        engine.say(n, "x")
    await until(lambda: third.text == "xxxx")
    await first.hang_up()
    for n in range(4, 10):
        engine.say(n, "y")
    await until(lambda: second.text == "xxxxyyyyyy")
    await second.hang_up()
    engine.say(10, "z", finish="stop")
    engine.end(5, 11)
    await third.task
    assert third.text == "xxxxyyyyyyz"
    own = [(r.call.outcome.own_prompt_tokens, r.call.outcome.own_completion_tokens) for r in (first, second, third)]
    assert own == [(5, 4), (0, 6), (0, 1)]
    # Half price for what others paid: second got 4 of first's, third 10 of theirs, both the prompt.
    billed = [(r.call.outcome.billed_prompt_tokens, r.call.outcome.billed_completion_tokens) for r in (first, second, third)]
    assert billed == [(5, 4), (3, 8), (3, 6)]
    assert engine.closed == 1
    assert len(answers.kept) == 1
    assert cache.under_way == 0


async def test_when_all_leave_it_is_cancelled_and_nothing_is_kept() -> None:
    journey, engine, answers, cache = told_journey()
    readers = [await join(journey, engine, greedy(n)) for n in range(3)]
    engine.say(0, "a")
    await until(lambda: all(reader.text == "a" for reader in readers))
    for reader in readers[:2]:
        await reader.hang_up()
    assert engine.closed == 0
    await readers[2].hang_up()
    assert engine.closed == 1
    assert answers.kept == {}
    assert cache.under_way == 0
    anew = await join(journey, engine, greedy(9))
    await until(lambda: len(engine.requests) == 2)
    await anew.hang_up()


async def test_a_slow_reader_holds_up_nobody() -> None:
    journey, engine, answers, _ = told_journey()
    slow = journey.run(greedy(1))
    begun = asyncio.create_task(anext(slow))
    await until(lambda: engine.speaking)
    engine.say(0, "a")
    await begun  # and reads no further
    quick = await join(journey, engine, greedy(2))
    engine.say(1, "b", finish="stop")
    engine.end(5, 2)
    await quick.task
    assert quick.text == "ab"
    assert len(answers.kept) == 1
    rest = [event async for batch in slow for event in batch]
    assert isinstance(rest[0], Delta)
    assert rest[0].text == "b"


async def test_a_failure_reaches_all_and_is_not_kept() -> None:
    journey, engine, answers, cache = told_journey()
    readers = [await join(journey, engine, greedy(n)) for n in range(3)]
    engine.say(0, "a")
    engine.fail(RequestFailed("broken"))
    ends = await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)
    assert [type(end) for end in ends] == [RequestFailed] * 3
    assert [reader.text for reader in readers] == ["a"] * 3
    assert answers.kept == {}
    assert cache.under_way == 0


async def test_each_has_its_own_deadline_and_the_next_takes_over() -> None:
    journey, engine, _, _ = told_journey()
    hasty = await join(journey, engine, greedy(1, timeout=0.05))
    patient = await join(journey, engine, greedy(2))
    assert engine.requests[0].timeout is None
    assert engine.requests[0].wanted_within == pytest.approx(0.05, abs=0.02)
    with pytest.raises(DeadlineExceeded, match=r"waiting for its first token: 0\.\d\d s in the queue and in prefill"):
        await hasty.task
    assert engine.closed == 0
    engine.say(0, "a", finish="stop")
    engine.end(5, 1)
    await patient.task
    assert (hasty.call.outcome.own_completion_tokens, patient.call.outcome.own_completion_tokens) == (0, 1)


async def test_a_deadline_that_passes_amid_the_answer_says_where_the_time_went() -> None:
    journey, engine, _, _ = told_journey()
    reader = await join(journey, engine, greedy(1, timeout=0.2))
    engine.say(0, "a")
    with pytest.raises(DeadlineExceeded, match=r"decoding: .* in prefill, 0\.\d\d s decoding \(1 tokens generated\)"):
        await reader.task
    assert reader.text == "a"


async def test_a_deadline_that_cant_be_met_refuses_only_its_own_request() -> None:
    journey, engine, _, cache = told_journey()
    hasty = await join(journey, engine, greedy(1, timeout=5.0))
    patient = await join(journey, engine, greedy(2))
    assert len(engine.requests) == 1
    engine.fail(DeadlineUnmeetable("not within 5 s"))
    with pytest.raises(DeadlineUnmeetable):
        await hasty.task
    await until(lambda: len(engine.requests) == 2)
    engine.say(0, "a", finish="stop")
    engine.end(5, 1)
    await patient.task
    assert patient.text == "a"
    assert (patient.call.outcome.served_from, patient.call.outcome.billed_completion_tokens) == ("engine", 1)
    assert cache.under_way == 0


async def test_who_is_refused_further_on_neither_pays_nor_harms_the_others() -> None:
    refused = "r1"

    @asynccontextmanager
    async def limit(call: Call) -> AsyncIterator[None]:
        if call.id == refused:
            raise RateLimited("slowly")
        yield

    journey, engine, _, _ = told_journey(limit)
    readers = [Reader(journey, greedy(n)) for n in (1, 2)]
    await until(lambda: engine.speaking)
    engine.say(0, "a", finish="stop")
    engine.end(5, 1)
    ends = await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)
    assert [type(end) for end in ends] == [RateLimited, type(None)]
    assert readers[1].call.outcome.billed_completion_tokens == 1
    assert len(engine.requests) == 1


async def test_who_was_cut_to_a_budget_or_degraded_is_apart() -> None:
    @asynccontextmanager
    async def cut(call: Call) -> AsyncIterator[None]:
        assert call.request is not None
        if call.id == "r1":
            shorter = msgspec.structs.replace(call.request.sampling, max_tokens=1)
            call.request = msgspec.structs.replace(call.request, sampling=shorter)
        elif call.id == "r2":
            call.storable = False
        yield

    journey, engine, answers, _ = told_journey(cut)
    readers = [await join(journey, engine, greedy(n)) for n in (1, 2, 3, 4)]
    assert [request.id for request in engine.requests] == ["r1", "r2", "r3"]
    for n in range(3):
        engine.say(0, f"{n}", of=n, finish="length" if n == 0 else "stop")
        engine.end(5, 1, of=n)
    await asyncio.gather(*(reader.task for reader in readers))
    assert [reader.text for reader in readers] == ["0", "1", "2", "2"]
    assert [reader.call.headers["x-headrace-cache"] for reader in readers] == ["miss", "miss", "miss", "hit"]
    again = Reader(journey, greedy(5))
    await again.task
    assert again.text == "2"
    assert len(answers.kept) == 1


async def test_all_are_told_what_served_them_and_nothing_of_the_firsts_limits() -> None:
    journey, engine, answers, _ = told_journey()
    first = await join(journey, engine, greedy(1))
    late = await join(journey, engine, greedy(2))
    first.call.headers |= {"x-headrace-fallback": "m2; busy", "x-ratelimit-remaining-requests": "7"}
    first.call.storable = False
    engine.say(0, "a", finish="stop")
    engine.end(5, 1)
    await asyncio.gather(first.task, late.task)
    assert late.call.headers == {"x-headrace-cache": "hit", "x-headrace-fallback": "m2; busy"}
    assert answers.kept == {}


async def test_tenants_never_share() -> None:
    journey, engine, _, _ = told_journey()
    one = await join(journey, engine, greedy(1, tenant=1))
    two = await join(journey, engine, greedy(2, tenant=2))
    three = await join(journey, engine, greedy(3, tenant=1, subject_tenant="ada"))
    await until(lambda: len(engine.requests) == 3)
    for reader in (one, two, three):
        await reader.hang_up()


async def test_all_ask_the_second_level_once() -> None:
    journey, engine, answers, _ = told_journey()
    readers = [Reader(journey, greedy(n)) for n in range(8)]
    await until(lambda: all(reader.call.outcome.engine_request for reader in readers))
    assert answers.fetches == 1
    assert len(engine.requests) == 1
    for reader in readers:
        await reader.hang_up()
    assert engine.closed == 1


@settings(max_examples=60, deadline=None)
@given(
    joins=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    leaves=st.lists(st.integers(1, 25), min_size=6, max_size=6),
)
def test_every_token_is_billed_once_whoever_comes_and_goes(joins: list[int], leaves: list[int]) -> None:
    """Members join and leave between the tokens; what the engine made while anybody listened is on exactly one bill."""

    async def play() -> None:
        journey, engine, _, cache = told_journey()
        members: list[Reader | None] = [None] * len(joins)
        calls = [greedy(n) for n in range(len(joins))]
        made: dict[int, int] = {}
        for step in range(20):
            for n, at in enumerate(joins):
                if at == step:
                    members[n] = await join(journey, engine, calls[n])
            here = [member for member in members if member is not None and not member.task.done()]
            if here:
                generation = len(engine.speaking) - 1
                before = len(here[0].text)
                engine.say(made.get(generation, 0), "x")
                made[generation] = made.get(generation, 0) + 1
                await until(lambda g=generation, here=here: all(len(member.text) == made[g] for member in here))
                assert before < made[generation]
            for n, member in enumerate(members):
                if member is not None and leaves[n] == step:
                    await member.hang_up()
        for member in members:
            if member is not None and not member.task.done():
                await member.hang_up()
        assert sum(call.outcome.billed_completion_tokens for call in calls) == sum(made.values())
        assert sum(call.outcome.own_prompt_tokens or 0 for call in calls) == 5 * len(engine.requests)
        assert engine.closed == len(engine.requests)
        assert cache.under_way == 0

    asyncio.run(play())
