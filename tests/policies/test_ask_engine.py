from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
from flaky_engines import FlakyEngine, Gateway, asked, said, served

from headrace.call import Call
from headrace.errors import (
    BadRequest,
    CircuitOpen,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    Overloaded,
    RateLimited,
    RequestFailed,
    UpstreamError,
)
from headrace.policies import circuit
from headrace.policies.ask_engine import MODEL_HEADER
from headrace.types import EngineStatus

pytestmark = pytest.mark.anyio

STRICT = {"breaker_min_calls": 2, "breaker_open_seconds": 5, "breaker_probes": 2, "retry_budget": 0}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit, "FLUSH", 0.0)
    monkeypatch.setattr(circuit, "ONE_DEATH", 0.0)
    monkeypatch.setattr("headrace.policies.retry.FIRST_PAUSE", 0.001)


async def fails(gateway: Gateway, error: HeadraceError, times: int = 2, **fields: object) -> None:
    engine = gateway.models.default.engine
    assert isinstance(engine, FlakyEngine)
    for _ in range(times):
        engine.turns.append([error])
        with pytest.raises(type(error)):
            await gateway.text(asked(**fields))
    await flushed()


async def flushed() -> None:
    await asyncio.sleep(0.001)


async def test_an_open_circuit_refuses_at_once_and_says_for_how_long() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **STRICT)
    await fails(gateway, UpstreamError("broken"))
    with pytest.raises(CircuitOpen, match="'m'") as refusal:
        await gateway.text(asked())
    assert refusal.value.retry_after is not None
    assert 4 < refusal.value.retry_after <= 5
    assert len(engine.requests) == 2


async def test_probes_close_it_again_and_no_more_than_those_are_let_through() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **STRICT)
    await fails(gateway, Overloaded("full"))
    gateway.place.forward(5)
    async with aclosing(gateway.journey.run(asked())) as one, aclosing(gateway.journey.run(asked())) as two:
        # A probe that hasn't got its first token holds its place; a generator that isn't read yet has not begun.
        number = await gateway.place.probe("m")
        assert number is not None
        await anext(one)
        assert gateway.place.breaker.state == "half_open"
        with pytest.raises(CircuitOpen, match="trying it"):
            await anext(two)
        gateway.place.probed("m", number, True)
        assert gateway.place.breaker.state == "closed"
    assert await gateway.text(asked()) == "fine"


async def test_a_failed_probe_opens_it_again() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **STRICT)
    await fails(gateway, UpstreamError("x"))
    gateway.place.forward(5)
    engine.turns.append([UpstreamError("still")])
    with pytest.raises(UpstreamError):
        await gateway.text(asked())
    assert gateway.place.breaker.state == "open"


async def test_a_probe_that_is_hung_up_on_leaves_its_place_to_another() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **(STRICT | {"breaker_probes": 1}))
    await fails(gateway, UpstreamError("x"))
    gateway.place.forward(5)
    never = asyncio.Event()

    async def generate(request: object) -> object:
        await never.wait()
        yield []

    answers = engine.generate
    engine.generate = generate  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(gateway.text(asked()))
    await asyncio.sleep(0.01)
    assert await gateway.place.probe("m") is None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    engine.generate = answers  # type: ignore[method-assign]
    assert await gateway.text(asked()) == "fine"
    assert gateway.place.breaker.state == "closed"


@pytest.mark.parametrize("error", [BadRequest("x"), RateLimited("theirs"), RequestFailed("this one alone")])
async def test_what_is_not_the_engines_fault_does_not_count(error: HeadraceError) -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    await fails(gateway, error, times=5)
    assert gateway.place.breaker.state == "closed"


async def test_what_the_server_ends_as_it_stops_does_not_count() -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    stopping = EngineUnavailable("The server is stopping.", retry_after=5)
    stopping.leaving = True
    await fails(gateway, stopping, times=5)
    engine = gateway.models.default.engine
    assert isinstance(engine, FlakyEngine)
    for _ in range(5):  # amid an answer
        engine.turns.append([*said("fine")[:2], stopping])
        with pytest.raises(EngineUnavailable):
            await gateway.text(asked())
    await flushed()
    assert gateway.place.breaker.state == "closed"


async def test_time_counts_from_arrival_and_not_from_the_ask() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), steps=(slow_step,), timeout=50)
    await gateway.text(asked(timeout=5.0, started_at=time.monotonic() - 2))
    await gateway.text(asked(started_at=time.monotonic() - 20))
    await gateway.text(asked(timeout=1.0, started_at=time.monotonic() - 2))
    left = [request.timeout or 0.0 for request in engine.requests]
    assert 2.5 < left[0] <= 2.95
    assert 29.5 < left[1] <= 29.95
    assert left[2] == 0.001


@asynccontextmanager
async def slow_step(call: Call) -> AsyncIterator[None]:
    await asyncio.sleep(0.05)
    yield


async def test_a_deadline_counts_unless_the_client_set_it() -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    await fails(gateway, DeadlineExceeded("late"), times=5, timeout=1.0)
    assert gateway.place.breaker.state == "closed"
    await fails(gateway, DeadlineExceeded("late"))
    assert gateway.place.breaker.state == "open"


async def test_an_engine_that_is_being_started_is_not_a_failing_one() -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    gateway.models.default.status = EngineStatus(state="failed", reason="It died too often.")
    await fails(gateway, EngineUnavailable("It died too often."), times=5)
    gateway.models.default.status = EngineStatus(state="ready")
    assert await gateway.text(asked()) == "fine"
    await fails(gateway, EngineUnavailable("can't be reached"), times=3)
    with pytest.raises(CircuitOpen):
        await gateway.text(asked())


async def test_hang_ups_do_not_count() -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    for _ in range(5):
        async with aclosing(gateway.journey.run(asked())) as batches:
            await anext(batches)
    await flushed()
    assert gateway.place.breaker.state == "closed"


async def test_failures_under_way_count() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **STRICT)
    broken = [*said("ab")[:1], UpstreamError("cut off")]
    for _ in range(2):
        engine.turns.append(broken)
        with pytest.raises(UpstreamError):
            await gateway.text(asked())
    await flushed()
    assert gateway.place.breaker.state == "open"
    assert len(engine.requests) == 2, "and are not tried again: something was said"


async def test_one_death_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit, "ONE_DEATH", 60.0)
    gateway = Gateway(served("m", FlakyEngine()), **STRICT)
    await fails(gateway, EngineDied("all of them at once"), times=30)
    assert gateway.place.breaker.state == "closed"


async def test_slow_calls_count_but_not_those_that_waited_their_turn() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), **STRICT, breaker_slow_ttft=0.02)
    for queue_ms in (30.0, 30.0, 30.0, 0.0, 0.0, 0.0):
        blocked = [lambda: __import__("time").sleep(0.03), *said("slow", queue_ms=queue_ms)]
        engine.turns.append(blocked)
        assert await gateway.text(asked()) == "slow"
        await flushed()
        assert gateway.place.breaker.state == "closed" or queue_ms == 0.0
    with pytest.raises(CircuitOpen):
        await gateway.text(asked())


async def test_breakers_can_be_off() -> None:
    gateway = Gateway(served("m", FlakyEngine()), **STRICT, breaker="off")
    await fails(gateway, UpstreamError("x"), times=20)
    assert await gateway.text(asked()) == "fine"


async def test_a_failure_before_the_first_token_is_tried_again() -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine))
    engine.turns += [[UpstreamError("hiccup")], [Overloaded("hiccup")]]
    call = asked()
    assert await gateway.text(call) == "fine"
    assert call.outcome.error is None
    assert call.headers[MODEL_HEADER] == "m"
    assert len(engine.requests) == 3
    assert engine.closed == 3
    timeouts = [request.timeout for request in engine.requests]
    assert timeouts == sorted(timeouts, key=lambda timeout: timeout or 0.0, reverse=True), "within one deadline"


async def test_the_retry_budget_ends() -> None:
    engine = FlakyEngine()
    engine.always = [UpstreamError("down")]
    gateway = Gateway(served("m", engine), breaker="off", retry_budget=0.1, retry_reserve=3)
    for _ in range(50):
        with pytest.raises(UpstreamError):
            await gateway.text(asked())
    assert 50 + 3 < len(engine.requests) <= 50 + 3 + 5


@pytest.mark.parametrize("error", [BadRequest("x"), RequestFailed("x"), EngineDied("x"), Overloaded("x", retry_after=60)])
async def test_what_trying_again_cannot_help_is_not_tried_again(error: HeadraceError) -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine))
    await fails(gateway, error, times=1)
    assert len(engine.requests) == 1


async def test_no_retry_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FlakyEngine()
    gateway = Gateway(served("m", engine), timeout=0.5)
    await fails(gateway, Overloaded("x", retry_after=1.0), times=1)
    assert len(engine.requests) == 1
