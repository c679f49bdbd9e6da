"""Takes the client's trace from its headers; a layer that is there only where tracing is on."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.policies.trace import PARENT

_NAMES = {b"traceparent": "traceparent", b"tracestate": "tracestate"}


class TraceContext:
    """Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            carrier: dict[str, str] = {}
            for name, value in scope["headers"]:
                known = _NAMES.get(name)
                if known is not None:
                    said = value.decode("latin-1")
                    carrier[known] = f"{carrier[known]},{said}" if known in carrier else said
            PARENT.set(carrier or None)
        await self._app(scope, receive, send)
