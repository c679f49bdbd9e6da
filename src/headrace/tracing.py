"""Spans on their way to a collector: OTLP over HTTP, from a thread of each API process. Nothing here blocks or fails a request.

Everything but the endpoint and the service's name is OpenTelemetry's own matter: its SDK reads `OTEL_TRACES_SAMPLER`,
`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES` and the like from the environment.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.config import TraceSection
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

TRACES_PATH = "/v1/traces"
EXPORT_TIMEOUT = 5.0
"""Seconds that the collector may take for a batch."""


def check_tracing(section: TraceSection) -> None:
    """Raises `ConfigError` where traces are wanted and what makes them isn't installed."""
    if section.otel_endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "otel_endpoint (OTEL_EXPORTER_OTLP_ENDPOINT) asks for traces, which need packages that are not installed: "
            "pip install 'headrace[otel]'."
        ) from error


class Tracing:
    """One API process's spans. What the collector won't take in time is dropped, and the log says so."""

    def __init__(self, section: TraceSection) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        assert section.otel_endpoint is not None
        endpoint = section.otel_endpoint.rstrip("/")
        if not endpoint.endswith(TRACES_PATH):
            endpoint += TRACES_PATH
        resource = Resource.create({"service.name": section.otel_service_name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT)))
        self.tracer: Tracer = self._provider.get_tracer("headrace", __version__)

    async def close(self, within: float) -> None:
        """Send what is left, for at most so many seconds."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        # A thread of our own, which the process's end doesn't wait for.
        threading.Thread(target=shut_down, name="traces", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), within)
        except TimeoutError:
            return
