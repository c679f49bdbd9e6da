from __future__ import annotations

import pytest
from flaky_engines import FlakyEngine, Gateway, asked, served

from headrace.config import ResilienceSection
from headrace.policies.ask_engine import MODEL_HEADER
from headrace.policies.degrade import HEADER, Degrade
from headrace.records import KeyRecord
from headrace.types import EngineStatus, Sampling

pytestmark = pytest.mark.anyio


def gateway(**settings: object) -> tuple[Gateway, FlakyEngine, FlakyEngine]:
    large, small = FlakyEngine("large"), FlakyEngine("small")
    made = Gateway(served("large", large), served("small", small, context=64))
    section = ResilienceSection.model_validate({"degrade_queue": 3} | settings)
    steps = [*made.journey._attempt_steps]
    steps.insert(-1, Degrade(made.models, section, made.prepare))
    made.journey._attempt_steps = tuple(steps)
    return made, large, small


async def test_a_short_queue_changes_nothing() -> None:
    made, large, _ = gateway(degrade_max_tokens=8, degrade_model="small")
    large.waiting = 3
    call = asked()
    assert await made.text(call) == "large"
    assert HEADER not in call.headers
    assert call.storable
    assert large.requests[0].sampling.max_tokens == 64


async def test_a_long_queue_makes_answers_shorter() -> None:
    made, large, _ = gateway(degrade_max_tokens=8)
    large.waiting = 4
    call = asked(sampling=Sampling(max_tokens=64, min_tokens=20))
    await made.text(call)
    sampling = large.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (8, 8)
    assert call.headers[HEADER] == "max_tokens=8"
    assert not call.storable


async def test_what_is_short_already_is_not_degraded() -> None:
    made, large, _ = gateway(degrade_max_tokens=8)
    large.waiting = 4
    call = asked(sampling=Sampling(max_tokens=8))
    await made.text(call)
    assert HEADER not in call.headers
    assert call.storable


async def test_a_long_queue_turns_to_the_smaller_model() -> None:
    made, large, small = gateway(degrade_max_tokens=8, degrade_model="small")
    large.waiting = 4
    call = asked()
    assert await made.text(call) == "small"
    assert call.headers[HEADER] == "model=small, max_tokens=8"
    assert call.headers[MODEL_HEADER] == "small"
    assert call.served_model == "small"
    assert call.model is None
    assert not call.storable
    assert small.requests[0].sampling.max_tokens == 8
    assert large.requests == []


@pytest.mark.parametrize("why", ["context", "key", "ids", "away"])
async def test_where_the_smaller_model_can_not_the_one_asked_for_goes_on(why: str) -> None:
    made, large, small = gateway(degrade_model="small")
    large.waiting = 4
    call = asked("x" * 100) if why == "context" else asked()
    if why == "key":
        call.caller = KeyRecord(id="key_1", name="k", prefix="hr-", digest=b"", tenant="t", models=("large",))
    elif why == "ids":
        call.text, call.tokens = None, [1, 2]
    elif why == "away":
        made.models.find("small").status = EngineStatus(state="failed")
    assert await made.text(call) == "large"
    assert HEADER not in call.headers
    assert call.storable
    assert small.requests == []
    assert call.headers[MODEL_HEADER] == "large"
    assert call.outcome.error is None
