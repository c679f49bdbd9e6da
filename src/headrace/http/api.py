"""The HTTP application: its layers, and its routes by URL."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace import __version__
from headrace.config import Config
from headrace.error_tracking import ErrorTracker
from headrace.http.admin import Admin
from headrace.http.admin_cache import AdminCache
from headrace.http.admin_errors import AdminErrors
from headrace.http.admin_keys import AdminKeys
from headrace.http.admin_models import AdminModels
from headrace.http.application import Application
from headrace.http.client_address import TrustedProxies
from headrace.http.compress import Compress
from headrace.http.docs import JSON_OBJECT, JSON_OR_STREAM, OPENAI_ERROR, STREAM, document, takes
from headrace.http.door import Door
from headrace.http.edge import Edge
from headrace.http.exchange import exchange_of
from headrace.http.gate import Gate
from headrace.http.health import HealthRoutes
from headrace.http.metrics import Metrics
from headrace.http.native import NativeChat
from headrace.http.native_wire import BatchReply, ChatReply, DetokenizeReply, InvalidFields, NativeError, TokenizeReply
from headrace.http.openai_chat import ChatCompletions
from headrace.http.openai_completions import Completions
from headrace.http.openai_models import Models
from headrace.http.problems import routing_answer
from headrace.http.request_tally import RequestTally
from headrace.http.route import Endpoint, ExactRoutes, Route
from headrace.http.serving import Control, Runs, Serving
from headrace.http.tokens import Tokens
from headrace.http.trace_context import TraceContext
from headrace.http.usage import UsageRoutes
from headrace.policies.admit import Crowds
from headrace.policies.callers import Callers
from headrace.policies.key_desk import KeyDesk
from headrace.policies.limit_requests import LimitRequests
from headrace.ports import ErrorBook, Ledger
from headrace.served import ServedModels
from headrace.stores.bookkeeper import Bookkeeper
from headrace.stores.cache_levels import CacheLevels
from headrace.stores.memory_keys import MemoryKeys

_REFUSED: dict[int | str, Any] = {
    400: {"model": NativeError, "description": "The request can't be served as it is"},
    404: {"model": NativeError, "description": "No such model"},
    422: {"model": InvalidFields, "description": "A field is missing, unknown or out of range"},
    503: {"model": NativeError, "description": "Not now"},
}
_UNAUTHORIZED: dict[int | str, Any] = {401: {"model": NativeError, "description": "No key, or one that the server doesn't know"}}
_BEARER: dict[str, list[str]] = {"bearer": []}
_OPENAI: dict[int | str, Any] = {400: OPENAI_ERROR, 404: OPENAI_ERROR}


def create_api(
    config: Config,
    models: ServedModels,
    journey: Runs,
    *,
    control: Control,
    callers: Callers | None = None,
    desk: KeyDesk | None = None,
    cache: CacheLevels | None = None,
    ledger: Ledger | None = None,
    books: Bookkeeper | None = None,
    errors: ErrorBook | None = None,
    tracker: ErrorTracker | None = None,
    tally: RequestTally | None = None,
    limits: LimitRequests | None = None,
) -> FastAPI:
    """The application that one API process serves. Without `callers` and `desk`, keys made at run time end with the process.

    Serve it with `uvicorn.Config(proxy_headers=False, access_log=False)`: it works out addresses and logs requests by itself.
    """
    if callers is None or desk is None:
        keys, pepper = MemoryKeys(), secrets.token_bytes(32)
        callers, desk = Callers(config.access, keys, pepper), KeyDesk(keys, keys, pepper)
    serving = Serving(config, models, journey, control)
    metrics = Metrics(models, control)
    if books is not None:
        books.away_told = metrics.ledger_away.set
    app = Application(
        title="Headrace",
        version=__version__,
        description="A language model over HTTP: the tutorial's own routes, and OpenAI's under /v1.",
        docs_url="/docs" if config.server.docs else None,
        openapi_url="/openapi.json" if config.server.docs else None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # A redirect would be to the address in the Host header, which anyone can write.
        redirect_slashes=False,
        # It would ask on every request whether somebody has set up OpenTelemetry.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _add_routes(app, serving, metrics, callers, desk, AdminCache(cache, models), UsageRoutes(ledger), AdminErrors(errors), limits)
    document(app)
    app.add_exception_handler(HTTPException, _no_such_route)
    # The last added is the outermost.
    app.add_middleware(ExactRoutes, routes=[route for route in app.routes if isinstance(route, Route)])
    app.add_middleware(Compress)
    if config.trace.otel_endpoint is not None:
        app.add_middleware(TraceContext)
    if config.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.server.cors_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                "X-Request-Id",
                "X-Client-Request-Id",
                "Server-Timing",
                "Retry-After",
                "X-Headrace-Cache",
                "X-Headrace-Filter",
                "X-Headrace-Limit",
                "X-Headrace-Model",
                "X-Headrace-Fallback",
                "X-Headrace-Degraded",
                *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
            ],
        )
    pages = [path for path in (app.docs_url, app.openapi_url) if path is not None]
    app.state.door = door = _door(config, models, control, keeps_answers=cache is not None)
    app.add_middleware(
        Edge,
        proxies=TrustedProxies(config.access.trusted_proxies),
        metrics=metrics,
        models=models,
        pages=pages,
        control=control,
        tracker=tracker,
        tally=tally,
        door=door,
    )
    return app


def _door(config: Config, models: ServedModels, control: Control, *, keeps_answers: bool) -> Door | None:
    """Where all that a refusal needs is known at the door."""
    resilience = config.resilience
    elsewhere = models.several or resilience.fallbacks or resilience.degrade_queue is not None
    if elsewhere or config.trace.otel_endpoint is not None or config.server.cors_origins:
        return None
    return Door(Crowds(models), control, keeps_answers=keeps_answers)


def _add_routes(
    app: FastAPI,
    serving: Serving,
    metrics: Metrics,
    callers: Callers,
    desk: KeyDesk,
    cache: AdminCache,
    bill: UsageRoutes,
    errors: AdminErrors,
    limits: LimitRequests | None,
) -> None:
    body_limit = int(serving.config.server.max_body_mib * 1048576)
    openai_chat = ChatCompletions(serving, body_limit)
    openai_completions = Completions(serving, body_limit)
    openai_models = Models(serving)
    chat = NativeChat(serving, body_limit)
    tokens = Tokens(serving, body_limit)
    health = HealthRoutes(serving)
    admin = Admin(serving)
    keys = AdminKeys(desk, body_limit)

    gated = partial(Gate, callers, limits=limits)
    inference = gated("inference")
    asking = gated("inference", counted=True)
    usage = gated("usage")
    administration = gated("admin", always=True)

    def add(
        method: str,
        path: str,
        endpoint: Endpoint,
        tag: str,
        *,
        gate: Gate | None = inference,
        body: dict[str, Any] | None = None,
        **documented: Any,
    ) -> None:
        keys = [] if gate is None else [_BEARER] if gate.always or callers.key_required else [_BEARER, {}]
        app.router.add_api_route(
            path,
            endpoint,
            methods=[method],
            tags=[tag],
            response_model=None,
            route_class_override=Route,
            openapi_extra={"security": keys, **(body or {})},
            **documented,
        )
        made = app.router.routes[-1]
        assert isinstance(made, Route)
        made.gate = gate

    # The busiest come first: routes are tried in order.
    add("POST", "/v1/chat/completions", openai_chat.create, "OpenAI", gate=asking, name="chat_completions",
        body=takes("ChatCompletionRequest"), responses={200: JSON_OR_STREAM, **_OPENAI})  # fmt: skip
    add("POST", "/v1/completions", openai_completions.create, "OpenAI", gate=asking, name="completions",
        body=takes("CompletionRequest"), responses={200: JSON_OR_STREAM, **_OPENAI})  # fmt: skip
    add("POST", "/chat", chat.chat, "Chat", gate=asking,
        body=takes("ChatQuestion"), responses={200: {"model": ChatReply}, **_REFUSED})  # fmt: skip
    add("POST", "/chat/stream", chat.stream, "Chat", gate=asking,
        body=takes("ChatQuestion"), responses={200: STREAM, **_REFUSED})  # fmt: skip
    add("POST", "/chat/batch", chat.batch, "Chat", gate=asking,
        body=takes("ChatQuestion", many=True), responses={200: {"model": BatchReply}, **_REFUSED})  # fmt: skip
    add("POST", "/chat/secure", chat.secure, "Chat", gate=gated("inference", always=True, counted=True),
        body=takes("ChatQuestion"),
        responses={200: {"model": ChatReply}, **_REFUSED, **_UNAUTHORIZED})  # fmt: skip
    add("POST", "/tokenize", tokens.tokenize, "Tokens",
        body=takes("TokenizeQuestion"), responses={200: {"model": TokenizeReply}, **_REFUSED})  # fmt: skip
    add("POST", "/detokenize", tokens.detokenize, "Tokens",
        body=takes("DetokenizeQuestion"), responses={200: {"model": DetokenizeReply}, **_REFUSED})  # fmt: skip
    add("GET", "/v1/models", openai_models.list, "OpenAI", name="models", responses={200: JSON_OBJECT})
    add("GET", "/v1/models/{model:path}", openai_models.retrieve, "OpenAI", name="model", responses={200: JSON_OBJECT, 404: OPENAI_ERROR})
    add("GET", "/health", health.health, "Health", gate=None)
    add("GET", "/health/live", health.live, "Health", gate=None)
    add("GET", "/health/ready", health.ready, "Health", gate=None)
    add("GET", "/health/startup", health.startup, "Health", gate=None)
    add("GET", "/metrics", metrics.scrape, "Health", gate=usage, name="metrics")
    on_the_spot = gated("admin", always=True, local=True)
    to_look_at = gated("admin", always=True, local=True, shown=True)
    add("GET", "/admin/ps", admin.ps, "Health", gate=to_look_at, name="ps", include_in_schema=False)
    add("POST", "/admin/reload", admin.reload, "Administration", gate=on_the_spot, name="reload")
    add("GET", "/admin/cache", cache.stats, "Administration", gate=on_the_spot, name="cache_stats")
    add("DELETE", "/admin/cache", cache.purge, "Administration", gate=on_the_spot, name="cache_purge")
    several = AdminModels(serving)
    add("GET", "/admin/models", several.list, "Administration", gate=on_the_spot, name="admin_models")
    add("GET", "/admin/models/{model:path}", several.show, "Administration", gate=on_the_spot, name="admin_model")
    for action, do in (("load", several.load), ("unload", several.unload), ("promote", several.promote), ("rollback", several.rollback)):
        path = f"/admin/models/{{model:path}}/{action}"
        add("POST", path, do, "Administration", gate=on_the_spot, name=f"model_{action}")
    add("GET", "/usage", bill.own, "Usage", gate=gated("usage", also="inference", always=True))
    add("GET", "/admin/usage", bill.all, "Usage", gate=on_the_spot, name="admin_usage")
    for method, path, endpoint in (
        ("GET", "/admin/keys", keys.list),
        ("POST", "/admin/keys", keys.create),
        ("GET", "/admin/keys/{id}", keys.show),
        ("DELETE", "/admin/keys/{id}", keys.revoke),
        ("POST", "/admin/keys/{id}/revoke", keys.revoke),
        ("POST", "/admin/keys/{id}/rotate", keys.rotate),
        ("GET", "/admin/tenants", keys.tenants),
        ("POST", "/admin/tenants", keys.create_tenant),
        ("GET", "/admin/tenants/{name:path}", keys.tenant),
        ("PATCH", "/admin/tenants/{name:path}", keys.set_tenant),
        ("GET", "/admin/audit", keys.audit),
        ("GET", "/admin/errors", errors.list),
    ):
        add(method, path, endpoint, "Administration", gate=administration)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    exchange = exchange_of(request.scope)
    allow = (error.headers or {}).get("Allow", "") if error.headers else ""
    return _Told(routing_answer(error.status_code, openai=exchange.openai, path=request.scope["path"], allow=allow))


class _Told(Response):
    """One of our answers, for Starlette's error layer, which wants a `Response`."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)
