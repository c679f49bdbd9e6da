"""A route of ours: FastAPI documents it, and calls it without what it doesn't need of FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import cast

import structlog
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.errors import HeadraceError
from headrace.http.answers import Answer
from headrace.http.exchange import exchange_of
from headrace.http.gate import Gate
from headrace.http.hangup import ClientGone
from headrace.http.problems import problem_answer, routing_answer, unexpected

Endpoint = Callable[[Request], Awaitable[Answer]]


class Route(APIRoute):
    """The endpoint takes the request and returns an answer; its errors are told in the route's dialect.

    Nobody passes a route whose `gate` was never set; None is for routes that are open to all.
    """

    gate: Gate | None

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        exchange.route = self.path
        methods = answered(self.methods or ())
        if scope["method"] not in methods:
            allow = ", ".join(sorted(methods))
            await routing_answer(405, openai=exchange.openai, path=scope["path"], allow=allow)(scope, receive, send)
            return
        endpoint, gate = cast(Endpoint, self.endpoint), self.gate
        try:
            if gate is not None:
                await gate.admit(exchange, scope)
            answer = await endpoint(Request(scope, receive))
            if gate is not None and exchange.items is not None:
                await gate.count(exchange)
            await answer(scope, receive, send)
            if gate is not None and exchange.error is not None:
                # Refused after a comment had opened the stream.
                await gate.count(exchange)
            return
        except ClientGone:
            exchange.gone = True
            if gate is not None:
                await gate.count(exchange)
            return
        except HeadraceError as error:
            exchange.error = error
            if exchange.status:
                raise
            if gate is not None:
                await gate.count(exchange)
            problem = error
        except Exception as error:
            exchange.error = error
            structlog.get_logger("headrace.http").exception("request failed", route=self.path, request_id=exchange.id)
            if exchange.status:
                raise
            problem = unexpected()
        await problem_answer(problem, openai=exchange.openai)(scope, receive, send)


def answered(methods: Collection[str]) -> set[str]:
    """What a route answers: HEAD wherever GET is, as HTTP has it; the server leaves the body out."""
    return {*methods, "HEAD"} if "GET" in methods else set(methods)


class ExactRoutes:
    """Finds a route without parameters by its path in one look-up; all else goes on to the router, which tries one after the other."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._routes: dict[str, dict[str, Route]] = {}
        for route in routes:
            if not route.param_convertors:
                self._routes.setdefault(route.path, {}).update(dict.fromkeys(answered(route.methods or ()), route))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = self._routes.get(scope["path"]) if scope["type"] == "http" and not scope.get("root_path") else None
        if methods is None:
            await self._app(scope, receive, send)
            return
        route = methods.get(scope["method"])
        if route is None:
            exchange = exchange_of(scope)
            exchange.route = scope["path"]
            await routing_answer(405, openai=exchange.openai, path=scope["path"], allow=", ".join(sorted(methods)))(scope, receive, send)
            return
        await route.handle(scope, receive, send)
