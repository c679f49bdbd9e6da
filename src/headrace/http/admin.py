"""`GET /admin/ps`, for `headrace ps` on the same machine."""

from __future__ import annotations

from starlette.requests import Request

from headrace.errors import Forbidden
from headrace.http.answers import Answer, json_answer
from headrace.http.client_address import is_loopback
from headrace.http.exchange import exchange_of
from headrace.http.serving import Serving


class Admin:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ps(self, request: Request) -> Answer:
        """The server's processes. Only for callers on this machine, and not through a proxy on it."""
        peer = request.client.host if request.client is not None else ""
        if not is_loopback(peer) or exchange_of(request.scope).forwarded:
            raise Forbidden("This route is only for the machine that the server runs on.")
        return json_answer(await self._serving.control.ps())
