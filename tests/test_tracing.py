"""Traces of a running server, as a collector gets them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector import Collector, Received, collector
from headrace.config import Config, TraceSection
from headrace.errors import ConfigError
from headrace.tracing import check_tracing
from running_server import RunningServer, eventually

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SERVER = 2
ERROR = 2


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Collector]]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "",
        "OTEL_SERVICE_NAME": "mill",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "HEADRACE_API_KEYS": "sesame-open-very-secret",
    }
    with collector() as kept:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = kept.url
        with RunningServer(tmp_path_factory.mktemp("traced"), "echo", environment=environment) as server:
            yield server, kept


def the_span(kept: Collector, request_id: str) -> Received:
    return eventually(
        lambda: next((span for span in kept.spans if span.attributes.get("headrace.request_id") == request_id), None), what="the span"
    )


@pytest.mark.slow
def test_a_whole_answer(traced: tuple[RunningServer, Collector]) -> None:
    server, kept = traced
    asked = {
        "model": "echo",
        "messages": [{"role": "user", "content": "a secret of mine"}],
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 7,
        "stop": ["never said"],
        "n": 2,
    }
    answer = server.client.post("/v1/chat/completions", json=asked, headers=PARENT)
    span = the_span(kept, answer.headers["x-request-id"])
    usage = answer.json()["usage"]
    assert (span.name, span.kind, span.status) == ("chat echo", SERVER, 0)
    assert (span.trace_id, span.parent_id) == (TRACE, SPAN)
    assert span.resource["service.name"] == "mill"
    said = span.attributes
    assert {name: said[name] for name in said if name.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "echo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.model": "echo",
        "gen_ai.response.finish_reasons": [choice["finish_reason"] for choice in answer.json()["choices"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
    }
    assert said["http.route"] == "/v1/chat/completions"
    phases = kept.below(span)
    assert set(phases) == {"queue", "prefill", "decode"}
    assert span.start <= phases["queue"].start <= phases["queue"].end == phases["prefill"].start
    assert phases["prefill"].end == phases["decode"].start <= phases["decode"].end <= span.end
    for raw in kept.raw:
        for private in (b"a secret of mine", b"never said", b"sesame"):
            assert private not in raw


@pytest.mark.slow
def test_a_stream(traced: tuple[RunningServer, Collector]) -> None:
    server, kept = traced
    answer = server.client.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 4, "stream": True})
    span = the_span(kept, answer.headers["x-request-id"])
    assert span.name == "text_completion echo"
    assert span.parent_id == ""
    assert span.attributes["gen_ai.request.stream"] is True
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] < (span.end - span.start) / 1e9
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert span.attributes["gen_ai.response.id"].startswith("cmpl-")


@pytest.mark.slow
def test_errors_and_hang_ups(traced: tuple[RunningServer, Collector]) -> None:
    server, kept = traced
    refused = server.client.post("/v1/chat/completions", json={"model": "my-own", "messages": [{"role": "user", "content": "x"}]})
    # Refused by the route, before there is a call.
    assert refused.status_code == 404
    refused = server.client.post("/v1/completions", json={"prompt": "word " * 5000, "max_tokens": 4})
    assert refused.status_code == 400
    span = the_span(kept, refused.headers["x-request-id"])
    assert (span.status, span.status_message) == (ERROR, "")
    assert span.attributes["error.type"] == "context_length_exceeded"
    assert kept.below(span) == {}
    with server.client.stream("POST", "/v1/completions", json={"prompt": "a b c " * 300, "max_tokens": 900, "stream": True}) as answer:
        next(answer.iter_lines())
    span = the_span(kept, answer.headers["x-request-id"])
    assert span.status == 0
    if span.attributes.get("headrace.hung_up"):
        assert "error.type" not in span.attributes


@pytest.mark.slow
def test_what_is_left_is_sent_at_the_end_and_a_dead_collector_hurts_nobody(tmp_path: Path) -> None:
    with collector() as kept:
        # Nothing would be sent within a minute.
        environment = {"HEADRACE_OTEL_ENDPOINT": kept.url + "/v1/traces", "OTEL_BSP_SCHEDULE_DELAY": "60000", "MAX_WORKERS": "2"}
        (tmp_path / "one").mkdir()
        with RunningServer(tmp_path / "one", "echo", environment=environment) as server:
            ids = {server.client.post("/chat", json={"prompt": f"hello {number}"}).headers["x-request-id"] for number in range(4)}
        assert {span.attributes.get("headrace.request_id") for span in kept.spans} >= ids
        kept.status = 503
        before = kept.requests
        (tmp_path / "two").mkdir()
        with RunningServer(tmp_path / "two", "echo", environment=environment | {"OTEL_BSP_SCHEDULE_DELAY": "50"}) as server:
            for number in range(4):
                assert server.client.post("/chat", json={"prompt": f"hello {number}"}).status_code == 200
            eventually(lambda: kept.requests > before, what="an attempt to export")
            assert server.client.post("/chat", json={"prompt": "still there"}).status_code == 200
        assert server.process.returncode == 0


def test_without_the_extra_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    check_tracing(Config().trace)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[otel\]'"):
        check_tracing(TraceSection(otel_endpoint="http://localhost:4318"))


@pytest.mark.parametrize("url", ["localhost:4317", "grpc://localhost:4317", "http://"])
def test_what_is_no_collector_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="OTLP over HTTP"):
        TraceSection(otel_endpoint=url)
