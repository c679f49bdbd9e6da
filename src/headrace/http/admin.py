"""`GET /admin/ps`, for `headrace ps`; `POST /admin/reload`."""

from __future__ import annotations

from starlette.requests import Request

from headrace.http.answers import Answer, json_answer
from headrace.http.serving import Serving
from headrace.http.whole_server import may_change_all


class Admin:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ps(self, request: Request) -> Answer:
        """The server's processes."""
        return json_answer(await self._serving.control.ps())

    async def reload(self, request: Request) -> Answer:
        """Read the configuration again: `{"changed": [names]}` once new connections are served with it, or 422 with the reason."""
        may_change_all(request, "The configuration is")
        return json_answer({"status": "reloaded", "changed": await self._serving.control.reload()})
