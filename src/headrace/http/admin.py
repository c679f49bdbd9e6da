"""`GET /admin/ps`, for `headrace ps`; `POST /admin/reload`."""

from __future__ import annotations

from starlette.requests import Request

from headrace.errors import Forbidden
from headrace.http.answers import Answer, json_answer
from headrace.http.exchange import exchange_of
from headrace.http.serving import Serving


class Admin:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ps(self, request: Request) -> Answer:
        """The server's processes."""
        return json_answer(await self._serving.control.ps())

    async def reload(self, request: Request) -> Answer:
        """Read the configuration again: `{"changed": [names]}` once new connections are served with it, or 422 with the reason."""
        caller = exchange_of(request.scope).caller
        key = caller.key if caller is not None else None
        if key is not None and not key.all_tenants:
            raise Forbidden("The configuration is every tenant's; your key administers only its own.")
        if key is None and "origin" in request.headers:
            # Where no key is needed on this machine, any web page could have its visitor's browser send this.
            raise Forbidden("Not from a web page, but with a key of scope `admin`.")
        return json_answer({"status": "reloaded", "changed": await self._serving.control.reload()})
