from __future__ import annotations

import pytest
from flaky_engines import FlakyEngine, Gateway, asked, served

from headrace.call import Call
from headrace.errors import HeadraceError, WaitTooLong
from headrace.policies.admit import Admit, Crowds, TurnAway
from headrace.types import PATIENT, Sampling
from headrace.waiting import BURST, Bounds, Line, Queue, rank_of

pytestmark = pytest.mark.anyio

BOUNDS = Bounds(1024, 2_000_000, 120.0)
FREE = Sampling(max_tokens=8, temperature=1.0)


class CrowdedEngine(FlakyEngine):
    said: tuple[Queue, Bounds] | None = None

    def crowd(self) -> tuple[Queue, Bounds] | None:
        return self.said


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
