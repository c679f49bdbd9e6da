"""A span for every call, in the words of OpenTelemetry's conventions for generative AI; part of the journey only where tracing is on.

The span's parent is the client's (W3C `traceparent`). Below it are the phases `queue`, `prefill` and `decode`, as the engine measured
them. Prompts, answers, stop strings and keys are in no span. Names: github.com/open-telemetry/semantic-conventions-genai,
docs/gen-ai/client-inference.md, as of 2026.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from headrace.call import Call
from headrace.errors import HeadraceError, ModelNotFound
from headrace.policies.ask_engine import MODEL_HEADER
from headrace.policies.cache import HEADER as CACHE_HEADER
from headrace.policies.degrade import HEADER as DEGRADED_HEADER
from headrace.policies.route import HEADER as FALLBACK_HEADER
from headrace.served import ServedModels
from headrace.types import Delta, Event, Sampling

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

PARENT: ContextVar[Mapping[str, str] | None] = ContextVar("headrace_trace_parent", default=None)
"""The client's `traceparent` and `tracestate`, which the HTTP floor sets for the request's task."""

PROVIDER = "headrace"
NO_MAXIMUM = 1_000_000
"""Tokens; what the wire makes of a request without a maximum of its own."""
_RESPONSE_IDS = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
_NANO = 10**9


class Trace:
    """The first step of all, so that refusals by the others are in the span, too."""

    def __init__(self, tracer: Tracer, models: ServedModels) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._tracer = tracer
        self._models = models
        self._propagator = TraceContextTextMapPropagator()

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        # Monotonic times of the journey, and the wall's of spans.
        wall = time.time_ns() - time.monotonic_ns()
        span = self._start(call, wall)
        if not span.is_recording():
            yield
            return
        finishes: dict[int, str] = {}
        call.taps.append(lambda batch: _note_finishes(batch, finishes))
        try:
            yield
        finally:
            ended = time.monotonic()
            span.set_attributes(self._response(call, finishes))
            error = call.outcome.error
            if isinstance(error, Exception):
                span.set_attribute("error.type", error.code if isinstance(error, HeadraceError) else type(error).__qualname__)
                # No description: messages may repeat what users wrote.
                span.set_status(self._api.StatusCode.ERROR)
            elif error is not None:
                span.set_attribute("headrace.hung_up", True)
            self._phases(span, call, wall, ended)
            span.end(wall + int(ended * _NANO))

    def _start(self, call: Call, wall: int) -> Span:
        operation = "chat" if call.messages is not None else "text_completion"
        try:
            model = call.model or self._models.find(None).public_name
            self._models.find(call.model)
            name = f"{operation} {model}"
        except ModelNotFound:
            # The name is the client's invention: it would make a kind of span of its own.
            model, name = (call.model or "")[:128], operation
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model.encode("utf-8", "replace").decode(),
            "http.route": call.route,
            "headrace.request_id": call.id,
            **_request(call.sampling),
        }
        if call.stream:
            attributes["gen_ai.request.stream"] = True
        prefix = _RESPONSE_IDS.get(call.route)
        attributes["gen_ai.response.id"] = call.id if prefix is None else prefix + call.id.removeprefix("req_").partition("-")[0]
        carrier = PARENT.get()
        context = None if carrier is None else self._propagator.extract(carrier)
        return self._tracer.start_span(
            name, context, kind=self._api.SpanKind.SERVER, attributes=attributes, start_time=wall + int(call.started_at * _NANO)
        )

    def _response(self, call: Call, finishes: Mapping[int, str]) -> dict[str, Any]:
        outcome, headers = call.outcome, call.headers
        said: dict[str, Any] = {
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.completion_tokens,
        }
        if outcome.cached_tokens:
            said["gen_ai.usage.cache_read.input_tokens"] = outcome.cached_tokens
        if finishes:
            said["gen_ai.response.finish_reasons"] = [finishes[choice] for choice in sorted(finishes)]
        if call.served_model is not None:
            said["gen_ai.response.model"] = headers.get(MODEL_HEADER) or self._models.find(call.served_model).public_name
        if call.stream and outcome.first_token_at is not None:
            said["gen_ai.response.time_to_first_chunk"] = outcome.first_token_at - call.started_at
        for name in (CACHE_HEADER, FALLBACK_HEADER, DEGRADED_HEADER):
            if name in headers:
                said["headrace." + name.removeprefix("x-headrace-")] = headers[name]
        if call.retried:
            said["headrace.retries"] = len(call.retried)
        return said

    def _phases(self, span: Span, call: Call, wall: int, ended: float) -> None:
        """What the engine did for this call, as spans: the phases meet where the first token came."""
        outcome = call.outcome
        report, first = outcome.report, outcome.first_token_at
        if outcome.served_from != "engine" or first is None:
            return
        phases = [("decode", first, ended if report is None else min(ended, first + report.decode_ms / 1000))]
        if report is not None:
            prefilled = max(call.started_at, first - report.prefill_ms / 1000)
            queued = max(call.started_at, prefilled - report.queue_ms / 1000)
            phases = [("queue", queued, prefilled), ("prefill", prefilled, first), *phases]
        context = self._api.set_span_in_context(span)
        for name, begin, end in phases:
            self._tracer.start_span(name, context, start_time=wall + int(begin * _NANO)).end(wall + int(end * _NANO))


def _request(sampling: Sampling) -> dict[str, Any]:
    said: dict[str, Any] = {"gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p}
    if sampling.max_tokens < NO_MAXIMUM:
        said["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.top_k:
        said["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        # Spans know 64 bits with a sign.
        said["gen_ai.request.seed"] = sampling.seed if -(2**63) <= sampling.seed < 2**63 else str(sampling.seed)
    if sampling.n != 1:
        said["gen_ai.request.choice.count"] = sampling.n
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(sampling, name):
            said[f"gen_ai.request.{name}"] = value
    return said


def _note_finishes(batch: list[Event], finishes: dict[int, str]) -> None:
    for event in batch:
        if type(event) is Delta and event.finish is not None:
            finishes[event.choice] = event.finish
