"""An OpenTelemetry collector for tests: takes OTLP over HTTP, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """A span as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    """Nanoseconds of Unix time."""
    end: int
    status: int
    """0 unset, 2 error."""
    status_message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[str]


@dataclass
class Collector:
    url: str = ""
    status: int = 200
    """What is answered."""
    spans: list[Received] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    requests: int = 0

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]

    def below(self, span: Received) -> dict[str, Received]:
        return {each.name: each for each in self.spans if each.parent_id == span.span_id}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def _attributes(given: Any) -> dict[str, Any]:
    return {each.key: _plain(each.value) for each in given}


def _spans(body: bytes) -> Iterator[Received]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.kind,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code,
                    span.status.message,
                    _attributes(span.attributes),
                    _attributes(resource.resource.attributes),
                    [event.name for event in span.events],
                )


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    kept = Collector(status=status)

    class Takes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            kept.requests += 1
            if kept.status == 200:
                kept.raw.append(body)
                kept.spans += _spans(body)
            self.send_response(kept.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Takes) as server:
        kept.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
