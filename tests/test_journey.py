from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from headrace.call import Call
from headrace.errors import RequestFailed, Unauthorized
from headrace.journey import Journey
from headrace.served import ServedModel, ServedModels
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, ModelFiles, Report, Sampling

pytestmark = pytest.mark.anyio


class ScriptedEngine:
    """Says what it is told to, and remembers whether it was closed."""

    def __init__(self, batches: list[list[Event] | Exception]) -> None:
        self.batches = batches
        self.closed = 0
        self.requests: list[GenerateRequest] = []

    async def start(self) -> EngineCard:
        return EngineCard(model="m", kind="echo", context_length=8, vocab_size=8, fingerprint="")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Event]]:
        self.requests.append(request)
        try:
            for batch in self.batches:
                await asyncio.sleep(0)
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            self.closed += 1

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...


def delta(index: int, text: str, finish: str | None = None) -> Delta:
    return Delta(choice=0, index=index, tokens=(index,), text=text, finish=finish)  # type: ignore[arg-type]


REPORT = Report(prompt_tokens=3, cached_tokens=1, completion_tokens=2, queue_ms=0, prefill_ms=0, decode_ms=0)


class Trace:
    """A step that writes down when it is entered and left, and how the call stood then."""

    def __init__(self, name: str, log: list[str], refuse: Exception | None = None) -> None:
        self.name, self.log, self.refuse = name, log, refuse

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        if self.refuse is not None:
            raise self.refuse
        self.log.append(f"+{self.name}")
        call.served_model = "m"
        call.request = GenerateRequest(id=call.id, prompt=[1, 2, 3], sampling=call.sampling)
        try:
            yield
        finally:
            self.log.append(f"-{self.name} {type(call.outcome.error).__name__} {call.outcome.completion_tokens}")


def journey(engine: ScriptedEngine, *steps: Trace) -> Journey:
    return Journey(steps, ServedModels([ServedModel(ModelFiles(name="m", kind="echo"), engine)]))


def call() -> Call:
    return Call(id="r", route="/chat", model=None, sampling=Sampling(max_tokens=4), text="hi")


async def test_steps_are_left_in_reverse_and_see_the_outcome() -> None:
    log: list[str] = []
    engine = ScriptedEngine([[delta(0, "a")], [delta(1, "b", "stop"), REPORT]])
    got = [batch async for batch in journey(engine, Trace("one", log), Trace("two", log)).run(call())]
    assert got == [[delta(0, "a")], [delta(1, "b", "stop"), REPORT]]
    assert log == ["+one", "+two", "-two NoneType 2", "-one NoneType 2"]
    assert engine.closed == 1


async def test_a_refusal_never_reaches_the_engine_and_unwinds_what_was_entered() -> None:
    log: list[str] = []
    engine = ScriptedEngine([[REPORT]])
    refused = call()
    with pytest.raises(Unauthorized):
        async for _ in journey(engine, Trace("one", log), Trace("two", log, Unauthorized("no"))).run(refused):
            pass
    assert log == ["+one", "-one Unauthorized 0"]
    assert engine.requests == []
    assert isinstance(refused.outcome.error, Unauthorized)


async def test_a_hang_up_closes_the_engine_and_counts_what_was_sent() -> None:
    log: list[str] = []
    engine = ScriptedEngine([[delta(0, "a")], [delta(1, "b")], [delta(2, "c")]])
    hung_up = call()
    async with aclosing(journey(engine, Trace("one", log)).run(hung_up)) as batches:
        async for _ in batches:
            break
    assert engine.closed == 1
    assert log == ["+one", "-one GeneratorExit 1"]
    assert hung_up.outcome.completion_tokens == 1


async def test_a_failure_in_mid_stream_is_the_outcome() -> None:
    engine = ScriptedEngine([[delta(0, "a")], RequestFailed("broken")])
    failed = call()
    with pytest.raises(RequestFailed):
        async for _ in journey(engine, Trace("one", [])).run(failed):
            pass
    assert isinstance(failed.outcome.error, RequestFailed)
    assert engine.closed == 1


async def test_transforms_run_in_order_and_an_emptied_batch_is_not_sent() -> None:
    engine = ScriptedEngine([[delta(0, "a")], [delta(1, "b", "stop")], [REPORT]])
    asked = call()
    asked.transforms += [
        lambda batch: [event for event in batch if not (isinstance(event, Delta) and event.index == 0)],
        lambda batch: [Delta(0, e.index, e.tokens, e.text.upper(), e.finish) if isinstance(e, Delta) else e for e in batch],
    ]
    got = [batch async for batch in journey(engine, Trace("one", [])).run(asked)]
    assert got == [[delta(1, "B", "stop")], [REPORT]]
    assert asked.outcome.finish == "stop"
    assert asked.outcome.completion_tokens == REPORT.completion_tokens
