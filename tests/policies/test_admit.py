from __future__ import annotations

import pytest
from flaky_engines import FlakyEngine, Gateway, asked, served

from headrace.call import Call
from headrace.errors import HeadraceError, WaitTooLong
from headrace.policies.admit import Admit, Crowds, TurnAway
from headrace.types import PATIENT, Sampling
from headrace.waiting import BURST, Bounds, Line, Newcomer, Queue, rank_of, with_newcomer

pytestmark = pytest.mark.anyio

BOUNDS = Bounds(1024, 2_000_000, 120.0)
FREE = Sampling(max_tokens=8, temperature=1.0)


class CrowdedEngine(FlakyEngine):
    said: tuple[Queue, Bounds] | None = None

    def crowd(self) -> tuple[Queue, Bounds] | None:
        return self.said

    def let_in(self, newcomer: Newcomer) -> None:
        assert self.said is not None
        self.said = with_newcomer(*self.said, newcomer), self.said[1]


def flood(tenant: int, *, each: int = 100) -> tuple[Queue, Bounds]:
    """One tenant holds all the places there are for patient requests."""
    line = Line(tenant, rank_of("default", PATIENT), BURST, BURST, BURST * each)
    front = Line(tenant, rank_of("default", PATIENT) + 1, 30, 30, 30 * each)
    return Queue(lines=(line, front), speed=1000.0, flooded=True, limit=1.0), BOUNDS


def gateway() -> tuple[Gateway, CrowdedEngine]:
    engine = CrowdedEngine("large")
    made = Gateway(served("large", engine))
    authorize, *rest = made.journey._attempt_steps
    crowds = Crowds(made.models)
    made.journey._attempt_steps = (TurnAway(crowds), authorize, *rest[:-1], Admit(crowds), rest[-1])
    return made, engine


async def refusal(made: Gateway, call: Call) -> HeadraceError:
    with pytest.raises(WaitTooLong) as caught:
        await made.text(call)
    return caught.value


async def test_an_engine_that_says_nothing_refuses_nobody() -> None:
    made, engine = gateway()
    assert await made.text(asked()) == "large"
    assert len(engine.requests) == 1


async def test_in_a_flood_the_prompt_is_not_even_read() -> None:
    made, engine = gateway()
    call = asked(sampling=FREE)
    engine.said = flood(call.tenant)
    error = await refusal(made, call)
    assert error.retry_after
    assert call.request is None, "nobody made the request"
    assert not engine.requests


async def test_what_the_cache_may_have_is_refused_after_it() -> None:
    made, engine = gateway()
    call = asked(sampling=Sampling(max_tokens=8, temperature=0.0))
    engine.said = flood(call.tenant)
    await refusal(made, call)
    assert call.request is not None, "the cache has its key from the request"
    assert not engine.requests


async def test_anothers_flood_refuses_nobody() -> None:
    made, engine = gateway()
    call = asked(sampling=FREE)
    engine.said = flood(call.tenant + 1, each=1)
    assert await made.text(call) == "large"


async def test_who_is_let_in_counts_before_the_worker_says_so() -> None:
    """Between two words of the worker not everybody is let in for whom alone there would be room."""
    made, engine = gateway()
    call = asked(sampling=FREE)
    line = Line(call.tenant, rank_of("default", PATIENT), BURST, BURST, BURST * 100)
    engine.said = Queue(lines=(line,), speed=100.0, flooded=True, limit=1.0), BOUNDS
    let_in = 0
    while let_in < 1000:
        try:
            await made.text(asked(sampling=FREE))
        except WaitTooLong:
            break
        let_in += 1
    assert 0 < let_in < 100
    assert len(engine.requests) == let_in
