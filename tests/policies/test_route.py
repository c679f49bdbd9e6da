from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest
from flaky_engines import FlakyEngine, Gateway, asked, said, served

from headrace.call import Call
from headrace.errors import (
    BadRequest,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    Forbidden,
    HeadraceError,
    RateLimited,
    RequestFailed,
    UpstreamError,
)
from headrace.policies.ask_engine import MODEL_HEADER
from headrace.policies.route import HEADER, candidate, canned
from headrace.records import KeyRecord
from headrace.served import ServedModel
from headrace.types import Delta, EngineStatus, Event, GenerateRequest, Report, Sampling

pytestmark = pytest.mark.anyio

ONCE = {"retry_budget": 0, "breaker": "off"}


class Books:
    """A step that writes down each attempt: its id, its model, and how it ended."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str | None, str]] = []

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        tags = call.id, call.served_model
        call.transforms.append(lambda batch: batch)
        try:
            yield
        finally:
            self.rows.append((*tags, type(call.outcome.error).__name__))


def two(**settings: object) -> tuple[Gateway, FlakyEngine, FlakyEngine, Books]:
    first, second, books = FlakyEngine("first"), FlakyEngine("second"), Books()
    chains = settings.pop("fallbacks", {"one": ("two",)})
    gateway = Gateway(served("one", first), served("two", second, context=64), steps=(books,), fallbacks=chains, **ONCE, **settings)  # type: ignore[arg-type]
    return gateway, first, second, books


async def test_the_model_that_was_asked_for_answers_while_it_can() -> None:
    gateway, _, second, books = two()
    call = asked()
    assert await gateway.text(call) == "first"
    assert call.headers[MODEL_HEADER] == "one"
    assert HEADER not in call.headers
    assert call.storable
    assert second.requests == []
    assert books.rows == [("r", "one", "NoneType")]


@pytest.mark.parametrize(
    "error", [UpstreamError("x"), EngineDied("x"), EngineUnavailable("x"), RateLimited("theirs"), RequestFailed("it alone")]
)
async def test_a_fallback_answers_and_says_so(error: HeadraceError) -> None:
    gateway, first, second, books = two()
    first.always = [error]
    call = asked()
    assert await gateway.text(call) == "second"
    assert (call.headers[MODEL_HEADER], call.headers[HEADER]) == ("two", error.code)
    assert not call.storable
    assert call.served_model == "two"
    assert call.outcome.error is None
    assert call.outcome.completion_tokens == 6
    assert books.rows == [("r", "one", type(error).__name__), ("r-fallback1", "two", "NoneType")]
    assert second.requests[0].id == "r-fallback1"
    assert len(call.transforms) == 1


@pytest.mark.parametrize("error", [BadRequest("x"), ContextLengthExceeded("x"), DeadlineExceeded("x")])
async def test_a_request_that_is_refused_is_refused(error: HeadraceError) -> None:
    gateway, first, second, _ = two()
    first.always = [error]
    with pytest.raises(type(error)):
        await gateway.text(asked())
    assert second.requests == []


async def test_nothing_is_spliced_onto_an_answer_that_has_begun() -> None:
    gateway, first, second, books = two()
    first.always = [*said("half")[:2], UpstreamError("cut off")]
    call = asked()
    async with aclosing(gateway.journey.run(call)) as batches:
        assert [[event.text for event in await anext(batches) if isinstance(event, Delta)] for _ in range(2)] == [["h"], ["a"]]
        with pytest.raises(UpstreamError):
            await anext(batches)
    assert second.requests == []
    assert HEADER not in call.headers
    assert books.rows == [("r", "one", "UpstreamError")]


async def test_every_step_of_a_candidate_is_left_before_the_next_is_tried() -> None:
    gateway, first, second, books = two()
    first.always = [UpstreamError("x")]
    second.turns.append([lambda: order.append(len(books.rows)), *said("second")])
    order: list[int] = []
    await gateway.text(asked())
    assert order == [1]
    assert first.closed == 1


async def test_when_all_fail_the_error_is_that_of_the_model_that_was_asked_for() -> None:
    gateway, first, second, _ = two()
    first.always, second.always = [UpstreamError("one is down")], [EngineDied("two is down")]
    call = asked()
    with pytest.raises(UpstreamError, match="one is down"):
        await gateway.text(call)
    assert HEADER not in call.headers
    assert call.id == "r"
    assert call.model is None


async def test_a_canned_answer_is_the_last_resort() -> None:
    gateway, first, second, _ = two(fallbacks={"one": ("two", "canned: Please come back later.")})
    first.always = second.always = [UpstreamError("down")]
    call = asked(sampling=Sampling(max_tokens=4, n=2))
    assert await gateway.text(call) == "Please come back later." * 2
    assert (call.headers[MODEL_HEADER], call.headers[HEADER]) == ("canned", "upstream_error")
    assert call.outcome.error is None
    assert call.outcome.completion_tokens == 0
    assert call.outcome.finish == "stop"
    assert not call.storable


async def test_a_key_is_not_served_by_a_model_that_it_is_not_for() -> None:
    gateway, first, second, _ = two(fallbacks={"one": ("two", "canned: later")})
    first.always = [UpstreamError("down")]
    key = KeyRecord(id="key_1", name="k", prefix="hr-", digest=b"", tenant="t", models=("one",))
    assert await gateway.text(asked(caller=key)) == "later"
    assert second.requests == []
    with pytest.raises(Forbidden):
        await gateway.text(asked(caller=key, model="two"))


async def test_a_fallback_that_can_not_take_the_prompt_is_passed_over() -> None:
    gateway, first, second, _ = two()
    first.always = [UpstreamError("down")]
    with pytest.raises(UpstreamError):
        await gateway.text(asked("x" * 100))
    assert second.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": [1, 2], "text": None},
        {"sampling": Sampling(max_tokens=4, logit_bias={5: 1.0})},
        {"sampling": Sampling(max_tokens=4, stop_token_ids=(3,))},
    ],
)
async def test_token_ids_mean_nothing_to_another_model(fields: dict[str, object]) -> None:
    gateway, first, second, _ = two()
    first.always = [UpstreamError("down")]
    with pytest.raises(UpstreamError):
        await gateway.text(asked(**fields))
    assert second.requests == []
    gateway.models.find("two").files = msgspec.structs.replace(gateway.models.find("two").files, fingerprint="one")
    assert await gateway.text(asked(**fields)) == "second", "unless it is the same one elsewhere"


async def test_an_engine_that_is_being_started_is_not_waited_for_while_others_are_left() -> None:
    gateway, first, _second, _ = two()
    gateway.models.default.status = EngineStatus(state="starting", reason="It died.")
    call = asked()
    assert await gateway.text(call) == "second"
    assert call.headers[HEADER] == "engine_unavailable"
    assert first.requests == []
    # The last one is: its client waits within the deadline.
    gateway.models.find("two").status = EngineStatus(state="starting")
    assert await gateway.text(asked()) == "second"


async def test_fallbacks_have_the_time_that_is_left() -> None:
    gateway, first, second, _ = two(timeout=30.0)
    first.turns.append([lambda: __import__("time").sleep(0.05), UpstreamError("x")])
    assert await gateway.text(asked()) == "second"
    left = second.requests[0].timeout
    assert left is not None
    assert 29 < left < 29.96


async def test_a_hang_up_in_between_ends_it() -> None:
    gateway, first, second, books = two()
    never = asyncio.Event()
    first.always = [UpstreamError("x")]

    async def generate(request: GenerateRequest) -> AsyncIterator[list[Event]]:
        await never.wait()
        yield []

    second.generate = generate  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(gateway.text(asked()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert books.rows[-1] == ("r-fallback1", "two", "CancelledError")


class OldAnswer:
    """`OldAnswers` with one answer, to one prompt."""

    async def old(self, call: Call, request: GenerateRequest, model: ServedModel) -> list[list[Event]] | None:
        prompt = bytes(token for token in request.prompt if token < 256)
        return canned("from memory", 1) if model.files.name == "one" and prompt.endswith(b"known") else None


async def test_an_answer_that_was_kept_is_given_again() -> None:
    first = FlakyEngine()
    first.always = [UpstreamError("down")]
    gateway = Gateway(served("one", first), fallbacks={"one": ("cache",)}, old=OldAnswer(), **ONCE)  # type: ignore[arg-type]
    call = asked("known")
    assert await gateway.text(call) == "from memory"
    assert (call.headers[MODEL_HEADER], call.headers[HEADER]) == ("one", "upstream_error")
    with pytest.raises(UpstreamError):
        await gateway.text(asked("strange"))


def test_entries_of_a_chain() -> None:
    assert [candidate(entry).kind for entry in ("cache", "canned: hi", "https://example.org/v1", "cached")] == [
        "cache",
        "canned",
        "model",
        "model",
    ]
    assert candidate("canned:  hi there ").text == "hi there"
    report = canned("x", 3)[0][-1]
    assert isinstance(report, Report)
    assert report.completion_tokens == 0
