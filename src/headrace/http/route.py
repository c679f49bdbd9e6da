"""A route of ours: FastAPI documents it, and calls it without what it doesn't need of FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import structlog
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.errors import HeadraceError
from headrace.http.answers import Answer
from headrace.http.exchange import exchange_of
from headrace.http.hangup import ClientGone
from headrace.http.problems import problem_answer, routing_answer, unexpected

Endpoint = Callable[[Request], Awaitable[Answer]]


class Route(APIRoute):
    """The endpoint takes the request and returns an answer; its errors are told in the route's dialect."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        exchange.route = self.path
        methods = self.methods or set()
        if scope["method"] not in methods:
            allow = ", ".join(sorted(methods))
            await routing_answer(405, openai=exchange.openai, path=scope["path"], allow=allow)(scope, receive, send)
            return
        endpoint = cast(Endpoint, self.endpoint)
        try:
            answer = await endpoint(Request(scope, receive))
            await answer(scope, receive, send)
            return
        except ClientGone:
            exchange.gone = True
            return
        except HeadraceError as error:
            if exchange.status:
                raise
            problem = error
        except Exception:
            structlog.get_logger("headrace.http").exception("request failed", route=self.path, request_id=exchange.id)
            if exchange.status:
                raise
            problem = unexpected()
        await problem_answer(problem, openai=exchange.openai)(scope, receive, send)


class ExactRoutes:
    """Finds a route without parameters by its path in one look-up; all else goes on to the router, which tries one after the other."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if not route.param_convertors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and not scope.get("root_path") else None
        if route is None:
            await self._app(scope, receive, send)
        else:
            await route.handle(scope, receive, send)
