"""The outermost layer, around every request: its id, its log line, its counts, and the answer to faults of our own."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.error_tracking import ErrorTracker
from headrace.errors import HeadraceError
from headrace.http.client_address import TrustedProxies
from headrace.http.door import Door
from headrace.http.exchange import Exchange, open_exchange
from headrace.http.failures import code_of, failures, track
from headrace.http.line import LINE
from headrace.http.metrics import Metrics, model_of
from headrace.http.problems import problem_answer, unexpected
from headrace.http.request_tally import RequestTally
from headrace.http.serving import Control
from headrace.logs import REQUEST_ID
from headrace.policies.cache import HEADER as CACHE_HEADER
from headrace.served import ServedModels

CLIENT_HUNG_UP = 499
"""What the log and the counters say where nobody was left to answer; nginx's word for it."""


def journey_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """What the steps of the journey say in headers, over all calls of the request, and of the caller's limits also where there is no call.

    Where calls say different things the last one counts; but the answer is from the cache only if all of its parts are.
    """
    said = exchange.late_headers() if exchange.late_headers is not None else {}
    for call in exchange.calls:
        said.update(call.headers)
        if call.late_headers is not None:
            said.update(call.late_headers())
        said.update((name.lower(), value) for name, value in call.notes.items())
    if exchange.calls:
        uses = {call.headers.get(CACHE_HEADER, "off") for call in exchange.calls}
        said[CACHE_HEADER] = uses.pop() if len(uses) == 1 else "miss"
    return [(name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in said.items()]


def _forget_where(exchange: Exchange) -> None:
    """Refusals were told, counted and tracked. Each knows the frames that it went through, and those know it: a cycle of all that belongs
    to the request, which under overload most requests would leave behind."""
    for error in (exchange.error, *[call.outcome.error for call in exchange.calls]):
        while isinstance(error, HeadraceError):
            error.__traceback__ = None
            error = error.__context__


class Edge:
    """Pure ASGI. Expects `uvicorn.Config(proxy_headers=False, access_log=False)`: addresses and log lines are its own matter."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        proxies: TrustedProxies,
        metrics: Metrics,
        models: ServedModels,
        pages: Collection[str] = (),
        control: Control | None = None,
        tracker: ErrorTracker | None = None,
        tally: RequestTally | None = None,
        door: Door | None = None,
    ) -> None:
        self._app = app
        self._door = door
        if door is not None:
            door.close = self._refused_at_door
        self._tracker = tracker
        self._tally = tally
        self._control = control
        self._proxies = proxies
        self._metrics = metrics
        self._models = models
        self._pages = frozenset(pages)
        """Paths of routes that aren't ours, such as /docs."""
        self._log: Any = structlog.get_logger("headrace.access")
        self._bound: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = open_exchange(scope, self._proxies)
        exchange.send = send
        exchange.line = scope.get(LINE)
        # The request's task ends with it, so nothing is to be set back.
        REQUEST_ID.set(exchange.id)
        if scope["path"] in self._pages:
            exchange.route = scope["path"]
        scope["headrace"] = exchange
        ours = [(b"x-request-id", exchange.id.encode()), (b"x-content-type-options", b"nosniff")]
        if exchange.client_id is not None:
            ours.append((b"x-client-request-id", exchange.client_id.encode()))

        async def send_with_ours(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *ours, *journey_headers(exchange)]
                if self._control is not None and self._control.leaving:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self._metrics.opened()
        try:
            await self._app(scope, receive, send_with_ours)
        except Exception as error:
            exchange.error = exchange.error or error
            self._log.exception("request failed", request_id=exchange.id)
            if exchange.status:
                raise
            await problem_answer(unexpected(), openai=exchange.openai)(scope, receive, send_with_ours)
        finally:
            self._close(exchange)
            if self._door is not None and exchange.line is not None and exchange.line.key is not None:
                self._door.note(exchange.line.key, exchange, scope, journey_headers(exchange))
            # The server's `send` knows the scope, and the scope this exchange: a cycle of all that belongs to the request.
            exchange.send = exchange.line = None
            _forget_where(exchange)
            exchange.error = None
            scope.pop(LINE, None)

    def _refused_at_door(self, exchange: Exchange) -> None:
        self._metrics.opened()
        self._close(exchange)

    def _close(self, exchange: Exchange) -> None:
        ended = time.monotonic()
        status = exchange.status or CLIENT_HUNG_UP
        served = model_of(self._models, exchange)
        model = served.public_name if served is not None else ""
        failed = failures(exchange)
        self._metrics.closed(exchange, status, model, ended, failed)
        if self._tally is not None:
            self._tally.note(exchange, failed, ended)
        if failed and self._tracker is not None:
            track(self._tracker, self._models, exchange, failed)
        # A logger that isn't bound is put together anew for each line.
        log = self._bound = self._bound or self._log.bind()
        if not log.is_enabled_for(logging.INFO):
            return
        said: dict[str, Any] = {
            "method": exchange.method,
            "route": exchange.route,
            "status": status,
            "seconds": round(ended - exchange.started_at, 6),
            "request_id": exchange.id,
        }
        if exchange.calls:
            calls = exchange.calls
            said["model"] = model
            said["prompt_tokens"] = sum(call.outcome.prompt_tokens for call in calls)
            said["completion_tokens"] = sum(call.outcome.completion_tokens for call in calls)
            if calls[0].key is not None:
                said["key"] = calls[0].key
        elif exchange.caller is not None and exchange.caller.key is not None:
            said["key"] = exchange.caller.key.id
        if failed:
            said["error"] = code_of(failed[0][1])
        if exchange.client_id is not None:
            said["client_request_id"] = exchange.client_id
        if exchange.gone:
            said["hung_up"] = True
        log.info("request", **said)
