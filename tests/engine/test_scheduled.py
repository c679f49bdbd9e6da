"""The own engine behind asyncio: events, hang-ups, refusals, and how it starts and ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from fake_runner import FakeResult, FakeRunner, LetterTokenizer, greedy

from headrace.config import EngineSection
from headrace.engine.scheduled import ScheduledEngine
from headrace.errors import (
    BadRequest,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    InvalidParameter,
    ModelError,
)
from headrace.ports import Engine, ForwardBatch, Runner, Submits
from headrace.types import Delta, Event, GenerateRequest, Report, Sampling

pytestmark = pytest.mark.anyio


class GatedRunner(FakeRunner):
    """Waits at the gate before each step, so that a test decides when a step ends."""

    def __init__(self) -> None:
        super().__init__(num_blocks=128)
        self.gate = threading.Event()
        self.gate.set()
        self.crash = False

    def forward(self, batch: ForwardBatch) -> FakeResult:
        assert self.gate.wait(10)
        if self.crash:
            raise SystemExit("crash")
        return super().forward(batch)


def make_engine(make_runner: Callable[[], Runner], **config: int) -> ScheduledEngine:
    return ScheduledEngine(
        make_runner,
        LetterTokenizer,
        name="fake",
        kind="fake",
        context_length=300,
        fingerprint="f",
        config=EngineSection(**config),  # type: ignore[arg-type]
    )


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture
async def engine(runner: GatedRunner) -> AsyncIterator[ScheduledEngine]:
    engine = make_engine(lambda: runner)
    await engine.start()
    yield engine
    runner.gate.set()
    await engine.close()


def ask(name: str = "a", prompt: Sequence[int] = (5, 6, 7), *, timeout: float | None = None, **sampling: object) -> GenerateRequest:
    wanted = Sampling(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return GenerateRequest(id=name, prompt=list(prompt), sampling=wanted, timeout=timeout)


async def collect(engine: Engine, request: GenerateRequest) -> list[Event]:
    return [event async for batch in engine.generate(request) for event in batch]


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_says_what_it_is(engine: ScheduledEngine) -> None:
    card = await engine.start()
    assert (card.model, card.kind, card.context_length, card.vocab_size, card.fingerprint) == ("fake", "fake", 300, 96, "f")
    assert isinstance(engine, Submits)
    assert engine.stats().steps == 0


async def test_generates_beside_others(engine: ScheduledEngine) -> None:
    answers = await asyncio.gather(*(collect(engine, ask(str(number), [5, number + 1])) for number in range(40)))
    for number, events in enumerate(answers):
        assert tokens(events) == greedy([5, number + 1], 5)
        assert isinstance(events[-1], Report)
    await until(lambda: engine.stats().running == 0)
    assert engine.stats().completion_tokens == 200
    assert engine.stats().blocks_used == 0


async def test_leaving_early_frees_the_sequence_within_two_steps(engine: ScheduledEngine, runner: GatedRunner) -> None:
    stream = engine.generate(ask(max_tokens=250))
    await anext(stream)
    runner.gate.clear()
    await stream.aclose()
    steps = engine.stats().steps
    runner.gate.set()
    await until(lambda: engine.stats().running == 0)
    assert engine.stats().steps <= steps + 2
    assert engine.stats().blocks_used == 0


async def test_a_cancelled_task_frees_the_sequence(engine: ScheduledEngine) -> None:
    task = asyncio.ensure_future(collect(engine, ask(max_tokens=290)))
    await until(lambda: engine.stats().running == 1 or task.done())
    task.cancel()
    await until(lambda: engine.stats().running == 0)
    await asyncio.wait([task])


async def test_a_cancelled_request_gets_its_report_and_its_id_is_free_again(engine: ScheduledEngine, runner: GatedRunner) -> None:
    got: list[Sequence[Event] | HeadraceError] = []
    runner.gate.clear()
    engine.submit(ask("x", max_tokens=200), got.append)
    engine.cancel("x")
    engine.cancel("nobody")
    runner.gate.set()
    await until(lambda: bool(got))
    assert isinstance(got[-1], list)
    assert isinstance(got[-1][-1], Report)
    assert tokens(await collect(engine, ask("x"))) == greedy([5, 6, 7], 5)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ask(prompt=[]), InvalidParameter, "empty"),
        (ask(prompt=[96]), InvalidParameter, "0 to 95"),
        (ask(prompt=[-1]), InvalidParameter, "0 to 95"),
        (ask(prompt=[10**30]), InvalidParameter, "0 to 95"),
        (ask(prompt=[5] * 300), ContextLengthExceeded, "300 tokens"),
    ],
)
async def test_refuses_what_it_cannot_serve(
    engine: ScheduledEngine, request_: GenerateRequest, error: type[HeadraceError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await collect(engine, request_)


async def test_an_id_is_used_once_at_a_time(engine: ScheduledEngine, runner: GatedRunner) -> None:
    stream = engine.generate(ask("same", max_tokens=200))
    await anext(stream)
    with pytest.raises(BadRequest, match="same"):
        await collect(engine, ask("same"))
    assert await anext(stream)
    await stream.aclose()


async def test_a_deadline_ends_a_request(engine: ScheduledEngine, runner: GatedRunner) -> None:
    stream = engine.generate(ask(max_tokens=290, timeout=0.05))
    await anext(stream)
    runner.gate.clear()
    deadline = time.monotonic() + 0.05
    await until(lambda: time.monotonic() > deadline)
    runner.gate.set()
    with pytest.raises(DeadlineExceeded, match="decoding"):
        async for _ in stream:
            pass


async def test_a_receiver_that_fails_costs_the_others_nothing(engine: ScheduledEngine) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

    def fail(events: object) -> None:
        raise RuntimeError("receiver")

    engine.submit(ask("bad"), fail)
    assert tokens(await collect(engine, ask("good"))) == greedy([5, 6, 7], 5)
    await until(lambda: engine.stats().running == 0)
    assert complaints


async def test_sleeps_when_there_is_nothing_to_do(engine: ScheduledEngine) -> None:
    await collect(engine, ask())
    await until(lambda: engine.stats().running == 0)
    before, until_then = time.process_time(), time.monotonic() + 0.2
    while time.monotonic() < until_then:
        await asyncio.sleep(0.05)
    assert time.process_time() - before < 0.1


async def test_closing_ends_what_runs(runner: GatedRunner) -> None:
    engine = make_engine(lambda: runner)
    await engine.start()
    stream = engine.generate(ask(max_tokens=290))
    await anext(stream)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineUnavailable):
        async for _ in stream:
            pass
    with pytest.raises(EngineUnavailable):
        await collect(engine, ask())
    assert not engine.failed.is_set()


async def test_a_model_that_cannot_be_loaded_is_said_at_start() -> None:
    def refuse() -> Runner:
        raise OSError("no such file")

    engine = make_engine(refuse)
    with pytest.raises(ModelError, match="no such file"):
        await engine.start()
    await engine.close()


async def test_a_refusal_to_load_is_no_crash_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> Runner:
        raise ModelError("A context of 8,192 tokens takes 180 MiB: raise kv_cache_gib.")

    engine = make_engine(refuse)
    with pytest.raises(ModelError, match="raise kv_cache_gib"):
        await engine.start()
    await engine.close()
    assert not caplog.records


async def test_a_crash_of_the_loop_ends_requests_and_says_so(runner: GatedRunner) -> None:
    engine = make_engine(lambda: runner)
    await engine.start()
    stream = engine.generate(ask(max_tokens=290))
    await anext(stream)
    runner.crash = True
    with pytest.raises(EngineDied):
        async for _ in stream:
            pass
    async with asyncio.timeout(10):
        await engine.failed.wait()
    assert isinstance(engine.failure, SystemExit)
    with pytest.raises(EngineDied):
        await collect(engine, ask())
    await engine.close()


async def test_a_crash_while_idle_never_happens_before_close() -> None:
    engine = make_engine(GatedRunner, max_sequences=2, step_tokens=16)
    await engine.start()
    assert tokens(await collect(engine, ask(prompt=[3] * 100))) == greedy([3] * 100, 5)
    await engine.close()
