"""Spans of calls, by the SDK's own exporter for tests; tests/test_tracing.py has them over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from headrace.call import Call, ServedFrom
from headrace.errors import EngineDied, ModelNotFound
from headrace.journey import Journey
from headrace.policies.trace import PARENT, Trace
from headrace.ports import Step
from headrace.served import ServedModel, ServedModels
from headrace.types import Delta, EngineStats, Event, ModelFiles, Report, Sampling

pytestmark = pytest.mark.anyio
TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TOKENS = [[Delta(0, 0, (1,), "a")], [Delta(0, 1, (2,), "b", "stop"), Report(3, 2, 2, 5.0, 7.0, 11.0)]]


class NoEngine:
    def stats(self) -> EngineStats:
        return EngineStats()


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    PARENT.set(None)


def journey(spans: InMemorySpanExporter, batches: list[list[Event] | Exception], served_from: ServedFrom = "engine") -> Journey:
    models = ServedModels([ServedModel(ModelFiles(name="m-1", kind="echo", aliases=("m",)), NoEngine())])  # type: ignore[arg-type]
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))

    async def source() -> AsyncIterator[list[Event]]:
        for batch in batches:
            await asyncio.sleep(0)
            if isinstance(batch, Exception):
                raise batch
            yield batch

    @asynccontextmanager
    async def answer(call: Call) -> AsyncIterator[None]:
        call.served_model = models.find(call.model).files.name
        call.source = source()
        call.outcome.served_from = served_from
        yield

    steps: list[Step] = [Trace(provider.get_tracer("t"), models), answer]
    return Journey(steps, models)


def call(**more: object) -> Call:
    return Call(id="req_1", route="/v1/completions", model=None, sampling=Sampling(max_tokens=4), text="a secret", **more)  # type: ignore[arg-type]


async def run(journey: Journey, call: Call, *, until: int = 99) -> None:
    async with aclosing(journey.run(call)) as batches:
        async for _ in batches:
            until -= 1
            if until == 0:
                break


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


async def test_the_phases_meet_at_the_first_token(spans: InMemorySpanExporter) -> None:
    PARENT.set({"traceparent": f"00-{TRACE:032x}-{SPAN:016x}-01", "tracestate": "a=b"})
    made = call()
    made.started_at -= 1
    await run(journey(spans, [*TOKENS]), made)
    found = by_name(spans)
    span = found["text_completion m"]
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (TRACE, SPAN)
    assert span.context is not None
    assert span.context.trace_state.get("a") == "b"
    queue, prefill, decode = (found[name] for name in ("queue", "prefill", "decode"))
    for phase in (queue, prefill, decode):
        assert phase.parent is not None
        assert phase.parent.span_id == span.context.span_id
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert abs(lasted(queue) - 5.0) < 0.01
    assert abs(lasted(prefill) - 7.0) < 0.01
    assert lasted(span) > 1000
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == 2
    assert "secret" not in span.to_json()


def lasted(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


async def test_what_breaks_under_way(spans: InMemorySpanExporter) -> None:
    with pytest.raises(EngineDied):
        await run(journey(spans, [TOKENS[0], EngineDied("with a secret")]), call())
    span = by_name(spans)["text_completion m"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "engine_died"
    assert span.attributes["gen_ai.usage.output_tokens"] == 1
    assert "secret" not in span.to_json()
    assert set(by_name(spans)) == {"text_completion m", "decode"}


async def test_a_fault_of_ours_is_named_by_its_class(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ZeroDivisionError):
        await run(journey(spans, [ZeroDivisionError("secret")]), call())
    span = by_name(spans)["text_completion m"]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ZeroDivisionError"
    assert "secret" not in span.to_json()


async def test_a_hang_up_is_no_error(spans: InMemorySpanExporter) -> None:
    await run(journey(spans, [*TOKENS]), call(stream=True), until=1)
    span = by_name(spans)["text_completion m"]
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes is not None
    assert span.attributes["headrace.hung_up"] is True
    assert "error.type" not in span.attributes


async def test_a_kept_answer_has_no_phases(spans: InMemorySpanExporter) -> None:
    await run(journey(spans, [*TOKENS], served_from="cache"), call())
    assert set(by_name(spans)) == {"text_completion m"}


async def test_a_models_name_that_a_client_made_up_names_no_span(spans: InMemorySpanExporter) -> None:
    made = call()
    made.model = "made-up"
    with pytest.raises(ModelNotFound):
        await run(journey(spans, []), made)
    span = by_name(spans)["text_completion"]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "model_not_found"
    assert span.attributes["gen_ai.request.model"] == "made-up"


async def test_a_parent_that_is_not_sampled_decides(spans: InMemorySpanExporter) -> None:
    PARENT.set({"traceparent": f"00-{TRACE:032x}-{SPAN:016x}-00"})
    await run(journey(spans, [*TOKENS]), call())
    assert by_name(spans) == {}
